"""Whether a checkpoint's files are what was written: all there, whole, every bit.

``torch.save`` puts a CRC-32 beside every tensor and object, computed from memory, and torch's
loader does not look at it.  :func:`verify` does, and checks what is around the data against itself:
a zip file says everything about an entry twice.  The index (``.metadata``, a pickle) and
``metadata.json`` have no checksum of their own; :func:`seal` writes one beside them when a
checkpoint is finished.  The large files are read back by nobody for that, so that saving takes
what it took, and a checkpoint without it (an older one, another program's) loads: there the index
has to agree with itself and with the files.
"""

import dataclasses
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "INDEX",
    "SEAL",
    "Damaged",
    "Entry",
    "check",
    "entries",
    "is_complete",
    "reopen",
    "seal",
    "verify",
]

INDEX = ".metadata"
CONFIG = "metadata.json"

#: Written by :func:`seal`; ``sha256sum -c`` reads it.
SEAL = "checksums.sha256"

_BLOCK = 1 << 20

# What a zip file is made of; see PKWARE's APPNOTE.
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_DESCRIPTOR = struct.Struct("<4sLLL")
_DESCRIPTOR64 = struct.Struct("<4sLQQ")
_LOCAL_CRC, _CENTRAL_CRC, _DESCRIPTOR_CRC = 14, 16, 4  # bytes before the checksum
_HAS_DESCRIPTOR = 8
_IN_ZIP64 = 0xFFFFFFFF


class Damaged(ValueError):
    """A checkpoint is not what was written; the message begins with the file's path."""


@dataclasses.dataclass(frozen=True)
class _Item:
    """A zip file in a file: a tensor or an object.

    Attributes:
        path: of the file.
        offset: of its first byte there.
        length: in bytes.
        data: bytes of the tensor, None if that is not known.
    """

    path: Path
    offset: int
    length: int
    data: int | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of the parts of which a tensor's or object's zip file is made.

    Attributes:
        name: ``archive/data/0``, for one.
        start: of its first byte, from the zip file's.
        size: in bytes.
        checksum: CRC-32 of them.
        checksum_at: where the zip file has that, as 4 bytes, the lowest first.
    """

    name: str
    start: int
    size: int
    checksum: int
    checksum_at: tuple[int, ...]

    @property
    def is_data(self) -> bool:
        """Whether it is a tensor's elements."""
        return "/data/" in f"/{self.name}" and "/.data/" not in f"/{self.name}"


def is_complete(folder: Path, *, config: bool = True) -> bool:
    """Whether a save of this iteration has ended: Megatron writes ``metadata.json`` after all else.

    In formats that have none (``config`` false) torch writes its index after all else.  In the
    format ``torch`` nothing tells.
    """
    if not config and (folder / INDEX).is_file():
        return True
    try:
        return isinstance(json.loads((folder / CONFIG).read_bytes()), dict)
    except (OSError, ValueError):
        return bool(list(folder.glob("mp_rank_*/*.pt")))


def seal(folder: Path) -> None:
    """Writes the checksums of the small files, whole or not at all, and to the disk."""
    part = folder / f".{SEAL}.part"
    with open(part, "w") as file:
        file.writelines(_checksums(folder).values())
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / SEAL)
    place = os.open(folder, os.O_RDONLY)
    os.fsync(place)
    os.close(place)


def reopen(folder: Path, *, config: bool = True) -> None:
    """What a save begins with: a folder that is written into is no complete checkpoint any more."""
    # The last is of Megatron's --verify-integrity.
    for name in (CONFIG if config else INDEX, SEAL, "integrity.json"):
        (folder / name).unlink(missing_ok=True)


def _checksums(folder: Path) -> dict[str, str]:
    """Lines of the small files that are there, by name."""
    return {
        name: f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in (INDEX, CONFIG)
        if (folder / name).is_file()
    }


def check(folder: Path, share: int = 0, of: int = 1, *, config: bool = True) -> None:
    """All files are there and not cut short; the small ones are what was written.

    Args:
        folder: of one iteration.
        share: which of ``of`` shares of the large files to look at.
        of: number of shares.
        config: whether ``metadata.json`` has to be there.

    Raises:
        Damaged: naming the first file that is not.
    """
    if (folder / INDEX).exists() or not list(folder.glob("mp_rank_*")):
        _check_small(folder, config)
    sizes: dict[Path, int] = {}
    for item in _items(folder):
        sizes[item.path] = max(item.offset + item.length, sizes.get(item.path, 0))
    for path, size in sorted(sizes.items())[share::of]:
        there = path.stat().st_size if path.is_file() else None
        if there is None:
            raise Damaged(f"{path} is missing")
        if there < size:
            raise Damaged(f"{path} has {there:,} bytes of at least {size:,}")


def _check_small(folder: Path, config: bool) -> None:
    if not (folder / INDEX).is_file():
        raise Damaged(f"{folder / INDEX} is missing")
    # Megatron goes by that file where it detects the format; its own indices say whose they are.
    if config or (folder / CONFIG).is_file() or hasattr(_index(folder), "mcore_data"):
        _check_config(folder / CONFIG)
    sealed = folder / SEAL
    if not sealed.is_file():
        _check_index(folder)
        return
    now, then = _checksums(folder), sealed.read_bytes().decode(errors="replace")
    for name, line in now.items():
        if line not in then.splitlines(keepends=True):
            raise Damaged(f"{folder / name} is not what {sealed} says, or that file is damaged")
    if "".join(now.values()) != then:
        raise Damaged(f"{sealed} is not what was written")


def _check_config(path: Path) -> None:
    try:
        json.loads(path.read_bytes())["sharded_backend"]
    except FileNotFoundError:
        raise Damaged(f"{path} is missing: the save was not finished, or it was lost") from None
    except Exception as error:
        raise _unreadable(path, error) from None


def _index(folder: Path) -> Any:
    import torch.distributed.checkpoint as dcp

    path = folder / INDEX
    try:
        index = dcp.FileSystemReader(folder).read_metadata()
        index.state_dict_metadata.items()
        index.storage_data.items()
    except Exception as error:
        raise _unreadable(path, error) from error
    return index


def _check_index(folder: Path) -> None:
    """Without a checksum: the index agrees with itself.  Every part of a tensor is somewhere once.

    Raises:
        Damaged: it does not.
    """
    path = folder / INDEX
    index = _index(folder)
    try:
        expected = {
            (name, tuple(chunk.offsets))
            for name, entry in index.state_dict_metadata.items()
            for chunk in getattr(entry, "chunks", [])
        } | {
            (name, None)
            for name, entry in index.state_dict_metadata.items()
            if not hasattr(entry, "chunks")
        }
        found = {(i.fqn, None if i.offset is None else tuple(i.offset)) for i in index.storage_data}
        if expected != found:
            (name, _), *_ = sorted(expected ^ found, key=str)
            raise Damaged(f"{path} is damaged: it does not say where all of {name} is, and no more")
        for name, entry in index.state_dict_metadata.items():
            if hasattr(entry, "chunks"):
                _check_chunks(path, name, entry)
        at: dict[str, int] = {}
        for place in sorted(
            index.storage_data.values(), key=lambda place: (place.relative_path, place.offset)
        ):
            if place.offset != at.get(place.relative_path, 0):
                raise Damaged(f"{path} is damaged: parts of {place.relative_path} overlap, or miss")
            at[place.relative_path] = place.offset + place.length
        for name, size in at.items():
            file = folder / name
            if file.is_file() and file.stat().st_size > size:
                raise Damaged(
                    f"{path} is damaged: it knows {size:,} bytes of {file}, which is longer"
                )
    except Damaged:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def _check_chunks(path: Path, name: str, entry: Any) -> None:
    inside = all(
        0 <= offset <= offset + size <= whole
        for chunk in entry.chunks
        for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
    )
    if not inside or sum(math.prod(c.sizes) for c in entry.chunks) != math.prod(entry.size):
        raise Damaged(f"{path} is damaged: the parts of {name} are not the whole")


def _items(folder: Path) -> list[_Item]:
    """All zip files of a checkpoint, in the order in which a disk has them."""
    items = [
        _Item(path, 0, path.stat().st_size)
        for path in (*folder.glob("*.pt"), *folder.glob("mp_rank_*/*.pt"))
    ]
    if (folder / INDEX).exists():
        index = _index(folder)
        try:
            items += _indexed(folder, index)
        except Exception as error:  # whatever a damaged pickle makes of its objects
            raise _unreadable(folder / INDEX, error) from error
    return sorted(items, key=lambda item: (item.path, item.offset))


def _indexed(folder: Path, index: Any) -> Iterator[_Item]:
    sizes = _sizes(index)
    for key, place in index.storage_data.items():
        if getattr(place, "transform_descriptors", None):
            continue  # compressed, which Megatron does not write
        size = sizes.get((key.fqn, tuple(key.offset or ())))
        yield _Item(folder / place.relative_path, int(place.offset), int(place.length), size)


def _unreadable(path: Path, error: Exception) -> Damaged:
    return Damaged(f"{path} cannot be read ({type(error).__name__}: {error})")


def _sizes(index: Any) -> dict[tuple, int]:
    """Bytes of every part of a tensor that the index knows, by name and offsets."""
    return {
        (name, tuple(chunk.offsets)): math.prod(chunk.sizes) * entry.properties.dtype.itemsize
        for name, entry in index.state_dict_metadata.items()
        for chunk in getattr(entry, "chunks", ())
    }


def verify(folder: Path, share: int = 0, of: int = 1) -> int:
    """Reads the files and compares every checksum.

    Args:
        folder: of one iteration, that :func:`check` finds nothing in.
        share: which of ``of`` equal shares to read: each rank takes one.
        of: number of shares.

    Returns:
        How many bytes were read.

    Raises:
        Damaged: naming the first file that is not what was written.
    """
    items = _items(folder)
    total, before, count = sum(item.length for item in items), 0, 0
    path, fd = None, -1
    try:
        for item in items:
            mine = min(before * of // max(total, 1), of - 1) == share
            before += item.length
            if not mine:
                continue
            count += item.length
            try:
                if item.path != path:
                    if fd >= 0:
                        os.close(fd)
                    path, fd = item.path, -1
                    fd = os.open(item.path, os.O_RDONLY)
                _verify_zip(fd, item)
            except OSError as error:
                raise Damaged(f"{item.path} cannot be read: {error}") from error
            except (struct.error, _Differs) as error:
                raise Damaged(
                    f"{item.path} is not what was written ({error}, in the part from byte "
                    f"{item.offset:,} to {item.offset + item.length:,})"
                ) from error
    finally:
        if fd >= 0:
            os.close(fd)
    return count


class _Differs(Exception):
    """Two things in a file that must agree do not."""


def _agree(what: str, *pairs: tuple[Any, Any]) -> None:
    if any(one != other for one, other in pairs):
        raise _Differs(what)


def _verify_zip(fd: int, item: _Item) -> None:
    sizes = []
    for entry in _entries(fd, item):
        found = _crc(fd, item.offset + entry.start, entry.size)
        _agree(f"the checksum of {entry.name}", (found, entry.checksum))
        if entry.is_data:
            sizes.append(entry.size)
    if item.data is not None:
        _agree(f"{sum(sizes):,} bytes where the index has {item.data:,}", (sum(sizes), item.data))


def _crc(fd: int, start: int, size: int) -> int:
    value, end = 0, start + size
    buffer = memoryview(bytearray(min(_BLOCK, size)))
    while start < end:
        count = os.preadv(fd, [buffer[: end - start]], start)
        if not count:
            raise _Differs("it ends too soon")
        value, start = zlib.crc32(buffer[:count], value), start + count
    return value


def entries(fd: int, offset: int, length: int) -> list[Entry]:
    """What a zip file of ``torch.save`` holds, that :func:`verify` finds nothing in.

    Args:
        fd: of an open file.
        offset: of the zip file's first byte in it.
        length: of the zip file.
    """
    return list(_entries(fd, _Item(Path(), offset, length)))


def _entries(fd: int, item: _Item) -> Iterator[Entry]:
    """All that a zip file of ``torch.save`` holds.

    Every number in its headers that a reader uses is compared with the other place where it is.
    """

    def read(form: struct.Struct, at: int) -> tuple:
        if at < 0 or at + form.size > item.length:
            raise _Differs("a header is out of place")
        return form.unpack(os.pread(fd, form.size, item.offset + at))

    end = item.length - _END.size
    count, size, offset = _directory(read, end)
    central = os.pread(fd, size, item.offset + offset)
    at, here = 0, 0
    for _ in range(count):
        (magic, _, needed, flags, method, _, _, crc, packed, plain, *lengths, disk, i, e, local) = (
            _CENTRAL.unpack_from(central, at)
        )
        _agree("the directory", (magic, b"PK\1\2"), ((method, lengths[2], disk, i, e), (0,) * 5))
        places = [offset + at + _CENTRAL_CRC]
        at += _CENTRAL.size
        name = central[at : at + lengths[0]]
        extra = central[at + lengths[0] : at + lengths[0] + lengths[1]]
        at += lengths[0] + lengths[1]
        wide = _IN_ZIP64 in (packed, plain, local)
        packed, plain, local = _widened([plain, packed, local], extra)
        _agree("the directory", (packed, plain), (local, here))
        there = read(_LOCAL, local)
        _agree("a header", (there[:4], (b"PK\3\4", needed, flags, method)), (there[9], len(name)))
        known = (0, 0, 0) if flags & _HAS_DESCRIPTOR else (crc, packed, plain)
        _agree("a header", (there[6:9], known))
        start = local + _LOCAL.size
        _agree("a name", (os.pread(fd, len(name), item.offset + start), name))
        start += len(name) + there[10]
        here = start + plain
        places.append(here + _DESCRIPTOR_CRC if flags & _HAS_DESCRIPTOR else local + _LOCAL_CRC)
        yield Entry(name.decode(errors="replace"), start, plain, crc, tuple(places))
        if flags & _HAS_DESCRIPTOR:
            form = _DESCRIPTOR64 if wide else _DESCRIPTOR
            _agree("a descriptor", (read(form, here), (b"PK\7\x08", crc, packed, plain)))
            here += form.size
    _agree("the directory", (at, size), (here, offset))


def _widened(values: list[int], extra: bytes) -> tuple[int, int, int]:
    """Packed and plain size and place of an entry; large ones are in its extra field."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, 4))
        extra = extra[4 + length :]
    if values.count(_IN_ZIP64) != len(wide):
        raise _Differs("the directory")
    plain, packed, local = (wide.pop(0) if v == _IN_ZIP64 else v for v in values)
    return packed, plain, local


def _directory(read: Any, end: int) -> tuple[int, int, int]:
    """Number of entries, size and place of the directory at a zip file's end."""
    magic, disk, first, count, counts, size, offset, comment = read(_END, end)
    _agree("the end", (magic, b"PK\5\6"), ((disk, first, comment), (0, 0, 0)), (count, counts))
    if end >= _END64_LOCATOR.size + _END64.size:
        at = end - _END64_LOCATOR.size
        magic, disk, place, disks = read(_END64_LOCATOR, at)
        if magic == b"PK\6\7":
            _agree("the end", ((disk, disks), (0, 1)), (place + _END64.size, at))
            record = read(_END64, place)
            _agree("the end", (record[:2], (b"PK\6\6", _END64.size - 12)), (record[4:6], (0, 0)))
            _agree("the end", (record[6], record[7]), (min(record[6], 0xFFFF), count))
            _agree("the end", (min(record[8], _IN_ZIP64), size))
            _agree("the end", (min(record[9], _IN_ZIP64), offset))
            count, size, offset, end = *record[7:], place
    _agree("the end", (offset + size, end))
    return count, size, offset
