"""Readers of the documents of a shard."""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megatron_s3.data import hub
from megatron_s3.data.errors import DataError
from megatron_s3.data.shards import Shard

_CHUNK = 1 << 20


def documents(shard: Shard) -> Iterator[bytes]:
    """Yields a shard's documents as UTF-8; an empty or blank one is yielded as b"".

    Raises:
        DataError: If a file or a record is damaged or has another form.
        IncompleteError: If the hub cannot be reached.
    """
    if shard.kind == "text":
        return map(_whole_file, shard.files)
    if shard.kind == "jsonl":
        return _from_jsonl(shard)
    if shard.kind == "parquet":
        return _from_parquet(shard)
    return _from_hub(shard)


def row_groups(path: str, column: str, target: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a parquet file into sequences of row groups.

    Args:
        path: The file.
        column: The column of the text.
        target: Uncompressed bytes of that column at which a sequence ends.

    Yields:
        The first row group, the one after the last, and the bytes of the column on disk.

    Raises:
        DataError: If the file is not parquet or has no such column of strings.
    """
    file = _parquet(path)
    names = file.schema_arrow.names
    if column not in names:
        raise DataError(
            f"{path}: no column {column!r} (it has {', '.join(map(repr, names))}); "
            "name the column of the text with --json-key"
        )
    if names.count(column) > 1:
        raise DataError(
            f"{path}: {names.count(column)} columns are named {column!r}; rename them, or name "
            "another one with --json-key"
        )
    kind = str(file.schema_arrow.field(column).type)
    if kind not in ("string", "large_string", "string_view"):
        raise DataError(
            f"{path}: column {column!r} holds {kind}, not strings; name the column of the text "
            "with --json-key"
        )
    # The position among the leaf columns: a nested column has several of them.
    metadata = file.metadata
    leaf = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)
    start = text = disk = 0
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(leaf)
        text += chunk.total_uncompressed_size
        disk += chunk.total_compressed_size
        if text >= target or group + 1 == metadata.num_row_groups:
            yield start, group + 1, disk
            start, text, disk = group + 1, 0, 0


def _checked(text: object, where: Callable[[], str], key: str) -> bytes:
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise DataError(
            f"{where()}: the value of {key!r} is {kind}, not a string; repair or remove the record"
        )
    try:
        return _encoded(text)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where()}: character {error.start} of the text is half of a surrogate pair, "
            "which UTF-8 cannot hold; repair or remove the record"
        ) from error


def _encoded(text: str) -> bytes:
    return b"" if text.isspace() else text.encode()


def _whole_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        # A mark of the encoding (U+FEFF) at the beginning is no text; nor is it in JSON lines.
        return _encoded(text.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {error.start}; convert it, or leave it out with --glob"
        ) from error


def _from_jsonl(shard: Shard) -> Iterator[bytes]:
    path = shard.files[0]
    if path.endswith((".gz", ".zst")) and not shard.stop:
        raise DataError(f"{path}: 0 bytes, and not a compressed file; fetch it again, or remove it")
    if path.endswith(".gz"):
        lines: Iterable[bytes] = _lines(_gunzipped(path))
    elif path.endswith(".zst"):
        lines = _lines(_unzstandarded(path))
    else:
        lines = _range(path, shard.start, shard.stop)
    number = 0

    def where() -> str:
        before = 0
        if shard.start:  # only an error needs the number of the line
            before = sum(1 for _ in _range(path, 0, shard.start))
        return f"{path}, line {before + number}"

    for line in lines:
        number += 1
        if line.strip():
            yield _text_of(line, shard.key, where)


def _text_of(line: bytes, key: str, where: Callable[[], str]) -> bytes:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where()}: not UTF-8 at byte {error.start} of the line; convert the file"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where()}: not JSON ({error.msg}); each line must be one object"
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{where()}: the JSON is nested too deeply to be read; remove the line"
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(
            f"{where()}: the JSON cannot be read ({error}); repair or remove the line"
        ) from error
    if not isinstance(record, dict) or key not in record:
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else "no object"
        raise DataError(
            f"{where()}: no key {key!r} (it has {keys}); name the key of the text with --json-key"
        )
    return _checked(record[key], where, key)


def _range(path: str, start: int, stop: int) -> Iterator[bytes]:
    """Yields the lines of a file whose first byte lies in [start, stop)."""
    try:
        with open(path, "rb") as file:
            position = start
            if start:  # the line of byte start - 1 belongs to an earlier shard
                file.seek(start - 1)
                position += len(file.readline()) - 1
            while position < stop and (line := file.readline()):
                position += len(line)
                yield line
            if position < stop:
                raise DataError(
                    f"{path}: became shorter while it was read; run the command again when "
                    "nothing writes to it"
                )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    open_line: list[bytes] = []
    for chunk in chunks:
        *closed, rest = chunk.split(b"\n")
        for line in closed:
            yield b"".join((*open_line, line))
            open_line = []
        open_line.append(rest)
    if any(open_line):
        yield b"".join(open_line)


def _gunzipped(path: str) -> Iterator[bytes]:
    import gzip

    try:
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cut off or damaged ({error}); fetch it again") from error


def _unzstandarded(path: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: reading it needs zstandard: pip install zstandard") from error

    def frame() -> "zstandard.ZstdDecompressionObj":
        # Accepts any window that zstd can write (--long=31); the default limit is 128 MiB.
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    # stream_reader() would take a truncated file for a complete one.
    try:
        with open(path, "rb") as file:
            current = None
            while chunk := file.read(_CHUNK):
                while chunk:
                    current = current or frame()
                    yield current.decompress(chunk)
                    chunk = current.unused_data
                    if current.eof:
                        current = None
    except (OSError, zstandard.ZstdError) as error:
        raise DataError(f"{path}: cut off or damaged ({error}); fetch it again") from error
    if current:
        raise DataError(f"{path}: cut off or damaged (no end of frame); fetch it again")


def _parquet(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading it needs pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: not a complete parquet file ({reason}); fetch it again"
        ) from error


def _from_parquet(shard: Shard) -> Iterator[bytes]:
    import pyarrow

    path = shard.files[0]
    file = _parquet(path)
    row = sum(file.metadata.row_group(g).num_rows for g in range(shard.start))

    def where() -> str:
        return f"{path}, row {row}"

    try:
        for batch in file.iter_batches(
            1024, row_groups=list(range(shard.start, shard.stop)), columns=[shard.key]
        ):
            for text in batch.column(shard.key):  # "a.b" may also name a field b of a column a
                row += 1
                try:
                    plain = text.as_py()
                except UnicodeDecodeError as error:
                    at = f"byte {error.start} of the text"
                    raise DataError(
                        f"{where()}: not UTF-8 at {at}; repair or remove the record"
                    ) from error
                yield _checked(plain, where, shard.key)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: damaged after row {row} ({reason}); fetch it again") from error


def _from_hub(shard: Shard) -> Iterator[bytes]:
    row = 0

    def where() -> str:
        return f"{shard.files[0]}, row {row}"

    for record in hub.records(shard.kind.removeprefix("hub:"), shard.files[0], shard.key):
        row += 1
        if shard.key not in record:
            raise DataError(
                f"{where()}: no column {shard.key!r} (it has {', '.join(map(repr, record))}); "
                "name the column of the text with --json-key"
            )
        yield _checked(record[shard.key], where, shard.key)
