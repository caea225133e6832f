"""Sources of documents, and the shards into which they are cut.

The shards depend on the input alone, so that a dataset is the same for any number of workers. After
a kill, the shards that were not finished are read again.
"""

import fnmatch
import os
import random
import stat
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_s3.data import hub, readers
from megatron_s3.data.dataset_parts import SPLITS
from megatron_s3.data.errors import DataError
from megatron_s3.data.shards import Shard

#: Names of the files to read in a folder without data files when no --glob is given.
TEXT_GLOBS = ("*.txt", "*.md", "*.rst", "*.py")
#: Files that hold many documents each.
DATA_GLOBS = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.parquet")
#: Files that are read as JSON lines only if the user names them: programs also keep their settings
#: in .json files.
JSON_GLOBS = tuple(
    f"*.{kind}{packed}" for kind in ("json", "ndjson") for packed in ("", ".gz", ".zst")
)

# Files that are not text for people to read: tests, vendored code, generated tables.
_STDLIB_SKIPPED_DIRS = {
    "__pycache__", "_bundled", "dist-packages", "encodings", "idle_test", "pydoc_data",
    "site-packages", "test", "tests",
}  # fmt: skip
#: What the names of a dataset's own files and folders add to its prefix; Megatron keeps caches in
#: folders that are named like its files.
_DATASET = (
    ".json", ".parts", "_tokenizer",
    *(f"_{side}{ending}" for side in SPLITS for ending in ("", ".bin", ".idx")),
)  # fmt: skip
_STDLIB_SKIPPED_FILES = ("_sysconfigdata*", "entities.py", "stringprep.py")
_SHUFFLE_SEED = 20240
# Shards are small, so that a kill loses little, but there are never many thousands of them.
_SHARD_BYTES = 4 << 20
_SHARDS = 1024
_TEXT_FILES = 1 << 14


@dataclass(frozen=True)
class Source:
    """A set of documents, which can be read repeatedly in the same order.

    Attributes:
        kind: `stdlib`, `directory`, `file` or `hub`.
        path: The folder or file, or the dataset's name on the Hugging Face hub.
        globs: File-name patterns for a folder; when empty, they depend on its content.
        json_key: The key (JSONL) or column (parquet, hub) that holds the text.
        config: Configuration of a dataset on the hub.
        revision: Commit, tag or branch of a dataset on the hub.
    """

    kind: str
    path: str
    globs: tuple[str, ...] = ()
    json_key: str = "text"
    config: str = ""
    revision: str = ""

    def describe(self) -> dict[str, object]:
        """Returns the source as JSON values; equal values describe the same documents."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v}

    def __str__(self) -> str:
        if self.kind == "stdlib":
            return f"the standard library of Python {sys.version.split()[0]}"
        if self.kind == "hub":
            return ":".join(filter(None, (f"hf:{self.path}", self.config)))
        return self.path

    def shards(self, prefix: str | None = None) -> list[Shard]:
        """Returns the shards of the documents' files, in order.

        Args:
            prefix: The prefix of the dataset that is made; its own files are left out.

        Raises:
            DataError: If there is no file to read, or a file cannot be read.
        """
        if self.kind == "hub":
            return hub.shards(self.path, self.config, self.revision, self.json_key)
        if self.kind == "file":
            files = [self.path]
        else:
            files = [os.path.join(self.path, name) for name in _files(self, prefix)]
        return list(_cut(files, self.json_key))

    def documents(self) -> Iterator[bytes]:
        """Yields the documents as UTF-8, one at a time, without empty ones.

        Raises:
            DataError: If a file or a record is damaged or has another form.
        """
        for shard in self.shards():
            yield from filter(None, readers.documents(shard))


def source(
    name: str, json_key: str | None = None, globs: list[str] | None = None, revision: str = ""
) -> Source:
    """Returns the source that `--input` names.

    Args:
        name: `stdlib`; a folder; a file whose name ends in one of `DATA_GLOBS`; a name in
            `hub.NAMED`; or `hf:NAME[:CONFIG]`, a dataset on the Hugging Face hub.
        json_key: The key or column that holds the text; when None, `text`, or the column of the
            named dataset.
        globs: File-name patterns for a folder.
        revision: Commit, tag or branch of a dataset on the hub.

    Raises:
        DataError: If nothing has that name, its format cannot be read, or an option does not
            apply to it.
    """
    path = Path(name)
    remote = name.startswith("hf:") or (name in hub.NAMED and not path.exists())
    if revision and not remote:
        raise DataError(
            f"--revision {revision}: applies only to a dataset on the hub, and not to {name}"
        )
    if globs and (name == "stdlib" or not path.is_dir()):
        raise DataError(f"--glob {' '.join(globs)}: applies only to a folder, and not to {name}")
    if remote:
        address, key = hub.NAMED.get(name, (name, "text"))
        json_key = key if json_key is None else json_key
        repository, _, config = address.removeprefix("hf:").partition(":")
        if not repository:
            raise DataError(f"--input {name}: no name after hf:; give hf:NAME or hf:NAME:CONFIG")
        return Source("hub", repository, json_key=json_key, config=config, revision=revision)
    key = "text" if json_key is None else json_key
    if name == "stdlib":
        return Source("stdlib", sysconfig.get_paths()["stdlib"], ("*.py",), key)
    if name and path.is_dir():
        return Source("directory", str(path.resolve()), tuple(globs or ()), key)
    if not name or not path.exists():
        raise DataError(
            f"--input {name or repr(name)}: does not exist; give a folder, a {_endings()} file, "
            f"'stdlib', {', '.join(hub.NAMED)} or hf:NAME"
        )
    if not _matches(path.name, DATA_GLOBS + JSON_GLOBS):
        raise DataError(
            f"--input {name}: the name of a single file must end in {_endings()}; "
            "for plain text, give the folder that holds the file"
        )
    return Source("file", str(path.resolve()), json_key=key)


def _endings() -> str:
    return ", ".join(glob.removeprefix("*") for glob in DATA_GLOBS)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _walk(src: Source, prefix: str | None, hidden: list[str] | None = None) -> Iterator[str]:
    """Yields the files below the source's path; follows symbolic links, but not in circles.

    Args:
        src: The source.
        prefix: The prefix of a dataset, whose files and caches are left out.
        hidden: A list to which the folders are added whose names begin with a point; they are
            left out.

    Raises:
        DataError: If a folder cannot be listed.
    """
    skipped = _STDLIB_SKIPPED_DIRS if src.kind == "stdlib" else set()
    own = {os.path.realpath(prefix) + ending for ending in _DATASET} if prefix else set()

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    for folder, folders, names in os.walk(src.path, onerror=unreadable, followlinks=True):
        if hidden is not None:
            hidden += [os.path.join(folder, name) for name in folders if name.startswith(".")]
        folders[:] = [
            name
            for name in folders
            if name not in skipped
            and not name.startswith(".")
            and os.path.join(folder, name) not in own
            and not _in_circle(folder, name)
        ]
        for name in names:
            if src.kind == "stdlib" and _matches(name, _STDLIB_SKIPPED_FILES):
                continue
            path = os.path.join(folder, name)
            if path not in own:
                yield os.path.relpath(path, src.path)


def _in_circle(folder: str, name: str) -> bool:
    """Returns whether a folder is a link to a folder that contains it."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    real = os.path.realpath(path)
    return os.path.commonpath([real, os.path.realpath(folder)]) == real


def _globs(src: Source, there: list[str]) -> tuple[str, ...]:
    if src.globs:
        return src.globs
    data = any(_matches(os.path.basename(n), DATA_GLOBS) for n in there)
    return DATA_GLOBS if data else TEXT_GLOBS


def _endings_of(names: list[str]) -> str:
    """Returns the most frequent endings and their counts."""
    seen: dict[str, int] = {}
    for name in names:
        base = os.path.basename(name)
        ending = "".join(Path(base).suffixes[-2:]) if base.endswith((".gz", ".zst")) else ""
        ending = ending or Path(base).suffix or base
        seen[ending] = seen.get(ending, 0) + 1
    common = sorted(seen, key=lambda e: (-seen[e], e))[:3]
    others = ", ..." if len(seen) > len(common) else ""
    return ", ".join(f"{e} ({seen[e]})" for e in common) + others


def left_out(src: Source, prefix: str | None = None) -> list[str]:
    """Returns one line for each reason for which files of a folder are left out.

    Args:
        src: The source.
        prefix: The prefix of the dataset that was made; its own files are not counted.

    Raises:
        DataError: If a folder cannot be listed.
    """
    if src.kind != "directory":
        return []
    hidden: list[str] = []
    there = list(_walk(src, prefix, hidden))
    globs = _globs(src, there)
    taken = [n for n in there if _matches(os.path.basename(n), globs)]
    others = [n for n in there if not _matches(os.path.basename(n), globs)]
    empty = [n for n in taken if not os.path.getsize(os.path.join(src.path, n))]
    told = []
    if others:
        files = f"{len(others):,} file{'s'[: len(others) > 1]}"
        told.append(f"{files} whose names match no {' '.join(globs)}: {_endings_of(others)}")
    if empty:
        told.append(f"{len(empty):,} file{'s'[: len(empty) > 1]} of 0 bytes: {_endings_of(empty)}")
    if hidden:
        told.append(
            f"{len(hidden):,} folder{'s'[: len(hidden) > 1]} whose names begin with a point"
        )
    return told


def _files(src: Source, prefix: str | None = None) -> list[str]:
    """Returns the source's files, relative to its path, in the same order on every machine.

    The files of the dataset at the prefix are not among them.
    """
    there = list(_walk(src, prefix))
    globs = _globs(src, there)
    found = [n for n in there if _matches(os.path.basename(n), globs)]
    if not found:
        holds = _endings_of(there) or "no files at all"
        patterns = " ".join(src.globs or TEXT_GLOBS + DATA_GLOBS)
        raise DataError(
            f"--input {src.path}: no file matches {patterns}; the folder holds {holds}; "
            "name the files with --glob"
        )
    # The files are shuffled so that related ones (of one package or author) fall on both sides.
    found.sort(key=lambda name: Path(name).as_posix())
    random.Random(_SHUFFLE_SEED).shuffle(found)
    return found


def _cut(files: list[str], key: str) -> Iterator[Shard]:
    stats = {}
    for path in files:
        try:
            stats[path] = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(stats[path].st_mode):
            raise DataError(f"{path}: not a regular file; leave it out with --glob")
    target = max(_SHARD_BYTES, sum(s.st_size for s in stats.values()) // _SHARDS)
    texts: list[str] = []  # text files, one document each
    before: int | None = 0

    def text_shard() -> Iterator[Shard]:
        if texts:
            size = sum(stats[p].st_size for p in texts)
            identity = tuple(_identity(stats[p]) for p in texts)
            yield Shard("text", tuple(texts), identity, size=size, before=before)

    gathered = 0
    for path in files:
        size, name = stats[path].st_size, os.path.basename(path)
        if not _matches(name, DATA_GLOBS + JSON_GLOBS):
            if size:
                texts.append(path)
                gathered += size
            if gathered >= target or len(texts) == _TEXT_FILES:
                yield from text_shard()
                before = None if before is None else before + len(texts)
                texts, gathered = [], 0
            continue
        yield from text_shard()  # documents keep the order of their files
        texts, gathered, before = [], 0, None
        identity = (_identity(stats[path]),)
        if name.endswith(".parquet"):
            for start, stop, size in readers.row_groups(path, key, target):
                yield Shard("parquet", (path,), identity, start, stop, key, size)
        elif not name.endswith((".gz", ".zst")):
            for start in range(0, size, target):
                stop = min(start + target, size)
                yield Shard("jsonl", (path,), identity, start, stop, key, stop - start)
        else:  # a compressed file can be read from its beginning only
            yield Shard("jsonl", (path,), identity, 0, size, key, size)
    yield from text_shard()


def _identity(of: os.stat_result) -> str:
    return f"{of.st_size} bytes of {of.st_mtime_ns}"
