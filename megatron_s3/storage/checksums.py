"""Verification of a checkpoint's files: all there, whole, every bit as it was written.

Tensors and objects have a checksum each (:mod:`~megatron_s3.storage.archive`).  The index
(``.metadata``, a pickle) and ``metadata.json`` have none of their own; :func:`seal` writes one
beside them when a checkpoint is finished.  The large files are read back by nobody for that, so
that saving takes what it took, and a checkpoint without it (an older one, another program's) loads:
there the index has to agree with itself and with the files.
"""

import hashlib
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
    """Writes the checksums of the small files, whole or not at all, and to the disk."""
    part = folder / f".{SEAL}.part"
    with open(part, "w") as file:
        file.writelines(_checksums(folder).values())
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / SEAL)
    sync(folder)


def sync(folder: Path) -> None:
    """Has the disk take what was done to the names in a folder."""
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def reopen(folder: Path, *, config: bool = True) -> None:
    """Begins a save: a folder that is written into is no complete checkpoint any more."""
    # The last is of Megatron's --verify-integrity.
    for name in (CONFIG if config else INDEX, SEAL, "integrity.json"):
        (folder / name).unlink(missing_ok=True)


def _checksums(folder: Path) -> dict[str, str]:
    """Returns the lines of the small files that are there, by name."""
    return {
        name: f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in (INDEX, CONFIG)
        if (folder / name).is_file()
    }


def check(folder: Path, share: int = 0, of: int = 1, *, config: bool = True) -> None:
    """Checks that all files are there and not cut short, and the small ones what was written.

    Args:
        folder: of one iteration.
        share: which of ``of`` shares of the large files to look at.
        of: number of shares.
        config: whether ``metadata.json`` has to be there.

    Raises:
        Damaged: naming the first file that is not.
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
            raise Damaged(f"{path} has {there:,} bytes of at least {size:,}")


def _check_small(folder: Path, config: bool) -> None:
    if not (folder / INDEX).is_file():
        raise Damaged(f"{folder / INDEX} is missing")
    # Megatron goes by that file where it detects the format; its own indices say whose they are.
    if config or (folder / CONFIG).is_file() or hasattr(index.read(folder), "mcore_data"):
        _check_config(folder / CONFIG)
    sealed = folder / SEAL
    if not sealed.is_file():
        index.check(folder)
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
        raise unreadable(path, error) from None


def _archives(folder: Path) -> list[Archive]:
    """Returns all archives of a checkpoint, in the order in which a disk has them."""
    found = [
        Archive(path, 0, path.stat().st_size)
        for path in (*folder.glob("*.pt"), *folder.glob("mp_rank_*/*.pt"))
    ]
    if (folder / INDEX).exists():
        found += index.archives(folder)
    return sorted(found, key=lambda one: (one.path, one.offset))


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
    found = _archives(folder)
    total, before, count = sum(one.length for one in found), 0, 0
    path, fd = None, -1
    try:
        for one in found:
            mine = min(before * of // max(total, 1), of - 1) == share
            before += one.length
            if not mine:
                continue
            count += one.length
            try:
                if one.path != path:
                    if fd >= 0:
                        os.close(fd)
                    path, fd = one.path, -1
                    fd = os.open(one.path, os.O_RDONLY)
                archive.verify(fd, one)
            except OSError as error:
                raise Damaged(f"{one.path} cannot be read: {error}") from error
            except (struct.error, archive.Differs) as error:
                raise Damaged(
                    f"{one.path} is not what was written ({error}, in the part from byte "
                    f"{one.offset:,} to {one.offset + one.length:,})"
                ) from error
    finally:
        if fd >= 0:
            os.close(fd)
    return count
