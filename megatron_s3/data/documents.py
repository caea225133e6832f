"""Where documents come from: the standard library, a directory, or a JSONL file."""

import fnmatch
import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

#: What a directory is searched for when no --glob is given.
TEXT_GLOBS = ("*.txt", "*.md", "*.rst", "*.py")

# Not text that people wrote for people to read: tests, vendored code, generated tables.
_STDLIB_SKIPPED_DIRS = {
    "__pycache__", "_bundled", "dist-packages", "encodings", "idle_test", "pydoc_data",
    "site-packages", "test", "tests",
}  # fmt: skip
_STDLIB_SKIPPED_FILES = ("_sysconfigdata*", "entities.py", "stringprep.py")
_SHUFFLE_SEED = 20240


class DataError(ValueError):
    """The input cannot be made into a dataset; the message says what to do instead."""


@dataclass(frozen=True)
class Source:
    """A set of documents, readable again and again in the same order.

    Attributes:
        kind: `stdlib`, `directory` or `jsonl`.
        path: The directory or file.
        globs: File-name patterns of a directory.
        json_key: The key of a JSONL record that holds its text.
    """

    kind: str
    path: str
    globs: tuple[str, ...] = ()
    json_key: str = ""

    def describe(self) -> dict[str, object]:
        """The source as JSON values; equal ones ask for the same documents."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v}

    def __str__(self) -> str:
        if self.kind == "stdlib":
            return f"the standard library of Python {sys.version.split()[0]}"
        return self.path

    def documents(self) -> Iterator[bytes]:
        """Yield the documents as UTF-8, one at a time.

        Raises:
            DataError: If a file or a JSONL line is not what it should be.
        """
        return _from_jsonl(self) if self.kind == "jsonl" else _from_files(self)


def source(name: str, json_key: str = "text", globs: list[str] | None = None) -> Source:
    """Find out what `--input` means.

    Args:
        name: `stdlib`, a directory, or a file whose name ends in `.jsonl`.
        json_key: The key of a JSONL record that holds its text.
        globs: File-name patterns for a directory; `TEXT_GLOBS` when empty.

    Raises:
        DataError: If there is nothing of that name or of a kind that can be read.
    """
    if name == "stdlib":
        return Source("stdlib", sysconfig.get_paths()["stdlib"], ("*.py",))
    path = Path(name)
    if path.is_dir():
        return Source("directory", str(path.resolve()), tuple(globs or TEXT_GLOBS))
    if not path.exists():
        raise DataError(
            f"--input {name}: there is none; give a directory, a .jsonl file or 'stdlib'"
        )
    if path.suffix != ".jsonl":
        raise DataError(
            f"--input {name}: a single file must be JSON lines with a name ending in .jsonl; "
            "for plain text give the directory that holds it"
        )
    return Source("jsonl", str(path.resolve()), json_key=json_key)


def _files(src: Source) -> list[str]:
    """The source's files, relative to its path, in an order that is the same on every machine."""
    found: list[str] = []
    seen: dict[str, int] = {}
    for folder, folders, names in os.walk(src.path):
        skipped = _STDLIB_SKIPPED_DIRS if src.kind == "stdlib" else set()
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        for name in names:
            if src.kind == "stdlib" and any(
                fnmatch.fnmatchcase(name, p) for p in _STDLIB_SKIPPED_FILES
            ):
                continue
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in src.globs):
                found.append(os.path.relpath(os.path.join(folder, name), src.path))
            else:
                ending = Path(name).suffix or name
                seen[ending] = seen.get(ending, 0) + 1
    if not found:
        common = sorted(seen, key=lambda e: (-seen[e], e))[:3]
        there = ", ".join(f"{e} ({seen[e]})" for e in common) or "no files at all"
        raise DataError(
            f"--input {src.path}: no file matches {' '.join(src.globs)}; it holds {there}: "
            "name the files with --glob"
        )
    # Shuffled, so that neighbours (one package, one author) fall on both sides of the split.
    found.sort(key=lambda name: Path(name).as_posix())
    random.Random(_SHUFFLE_SEED).shuffle(found)
    return found


def _from_files(src: Source) -> Iterator[bytes]:
    for name in _files(src):
        path = os.path.join(src.path, name)
        try:
            with open(path, "rb") as file:
                text = file.read()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 at byte {error.start}; convert it, or leave it out with --glob"
            ) from error
        if text.strip():
            yield text


def _from_jsonl(src: Source) -> Iterator[bytes]:
    number = 0
    with open(src.path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{src.path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not JSON ({error.msg}); each line must be one object"
                ) from error
            if not isinstance(record, dict) or src.json_key not in record:
                keys = ", ".join(map(repr, record)) if isinstance(record, dict) else "no object"
                raise DataError(
                    f"{where}: no key {src.json_key!r} (it has {keys}); "
                    "name the key of the text with --json-key"
                )
            text = record[src.json_key]
            if not isinstance(text, str):
                raise DataError(
                    f"{where}: the value of {src.json_key!r} is {type(text).__name__}, not a string"
                )
            if not text.strip():
                raise DataError(f"{where}: the text is empty; remove the line")
            try:
                yield text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}: character {error.start} of the text is half of a surrogate pair, "
                    "which UTF-8 cannot hold"
                ) from error
