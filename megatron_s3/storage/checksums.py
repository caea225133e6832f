"""Verification of a checkpoint's files: they are present, complete and unchanged.

Each tensor and object has a checksum (:mod:`~megatron_s3.storage.archive`).  The index
(``.metadata``, a pickle) and ``metadata.json`` have none of their own, so :func:`seal` writes their
checksums to a file when a checkpoint is finished.  It does not read the large files back, so saving
takes no longer.  A checkpoint without that file (an older one, or one that another program wrote)
loads too: its index is then checked against itself and the files.
"""

import hashlib
import itertools
import json
import os
import struct
from pathlib import Path

from megatron_s3.storage import archive, index
from megatron_s3.storage.archive import Archive
from megatron_s3.storage.errors import Damaged, unreadable
from megatron_s3.storage.layout import CONFIG, INDEX, SEAL, is_of_format_torch

__all__ = ["check", "reopen", "seal", "sync", "verify"]


def seal(folder: Path) -> None:
    """Writes the checksums of the small files atomically, and flushes them to the disk."""
    part = folder / f".{SEAL}.part"
    with open(part, "w") as file:
        file.writelines(_checksums(folder).values())
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / SEAL)
    sync(folder)


def sync(folder: Path) -> None:
    """Flushes created, renamed and removed names in a folder to the disk."""
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def reopen(folder: Path, *, config: bool = True) -> None:
    """Removes what marks a checkpoint as complete, before its folder is written to again."""
    # Megatron's --verify-integrity writes the last one.
    for name in (CONFIG if config else INDEX, SEAL, "integrity.json"):
        (folder / name).unlink(missing_ok=True)


def _checksums(folder: Path) -> dict[str, str]:
    """Returns the checksum lines of the small files that exist, by name."""
    return {
        name: f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in (INDEX, CONFIG)
        if (folder / name).is_file()
    }


def check(folder: Path, share: int = 0, of: int = 1, *, config: bool = True) -> None:
    """Checks that all files exist with their full size, and verifies the small files' checksums.

    Args:
        folder: the folder of one iteration.
        share: which of the ``of`` shares of the large files to check, from 0.
        of: the number of shares.
        config: whether ``metadata.json`` has to exist.

    Raises:
        Damaged: the message names the first file that fails.
    """
    if (folder / INDEX).exists() or not is_of_format_torch(folder):
        _check_small(folder, config)
    sizes: dict[Path, int] = {}
    for one in _archives(folder):
        sizes[one.path] = max(one.offset + one.length, sizes.get(one.path, 0))
    for path, size in sorted(sizes.items())[share::of]:
        there = path.stat().st_size if path.is_file() else None
        if there is None:
            raise Damaged(f"{path} is missing")
        if there < size:
            raise Damaged(f"{path} is truncated: {there:,} bytes, at least {size:,} expected")


def _check_small(folder: Path, config: bool) -> None:
    if not (folder / INDEX).is_file():
        raise Damaged(f"{folder / INDEX} is missing")
    # Megatron detects the format by that file.  An index with "mcore_data" is Megatron's.
    if config or (folder / CONFIG).is_file() or hasattr(index.read(folder), "mcore_data"):
        _check_config(folder / CONFIG)
    sealed = folder / SEAL
    if not sealed.is_file():
        index.check(folder)
        return
    now, then = _checksums(folder), sealed.read_bytes().decode(errors="replace")
    for name, line in now.items():
        if line not in then.splitlines(keepends=True):
            raise Damaged(
                f"{folder / name} does not match its checksum in {sealed}: one of them is damaged"
            )
    if "".join(now.values()) != then:
        raise Damaged(f"{sealed} is damaged: it does not list exactly the files that it covers")


def _check_config(path: Path) -> None:
    try:
        json.loads(path.read_bytes())["sharded_backend"]
    except FileNotFoundError:
        raise Damaged(f"{path} is missing: the save was not finished, or it was lost") from None
    except Exception as error:
        raise unreadable(path, error) from None


def _archives(folder: Path) -> list[Archive]:
    """Returns all archives of a checkpoint, in the order of their places in the files."""
    found = [
        Archive(path, 0, path.stat().st_size)
        for path in (*folder.glob("*.pt"), *folder.glob("mp_rank_*/*.pt"))
    ]
    if (folder / INDEX).exists():
        found += index.archives(folder)
    return sorted(found, key=lambda one: (one.path, one.offset))


def verify(folder: Path, share: int = 0, of: int = 1) -> int:
    """Reads the files and verifies every checksum.

    Args:
        folder: the folder of one iteration, which :func:`check` has accepted.
        share: which of the ``of`` equal shares to read, from 0: each rank takes one.
        of: the number of shares.

    Returns:
        The number of bytes read.

    Raises:
        Damaged: the message names the first file that fails.
    """
    found = _archives(folder)
    ends = list(itertools.accumulate((one.length for one in found), initial=0))
    whole = max(ends[-1], 1)
    mine = [
        one
        for one, before in zip(found, ends, strict=False)
        if min(before * of // whole, of - 1) == share
    ]
    for path, inside in itertools.groupby(mine, key=lambda one: one.path):
        try:
            with open(path, "rb", buffering=0) as file:
                for one in inside:
                    _verify(file.fileno(), one)
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error}") from error
    return sum(one.length for one in mine)


def _verify(fd: int, one: Archive) -> None:
    try:
        archive.verify(fd, one)
    except (struct.error, archive.Differs) as error:
        raise Damaged(
            f"{one.path} is damaged ({error}, in bytes {one.offset:,} to "
            f"{one.offset + one.length:,})"
        ) from error
