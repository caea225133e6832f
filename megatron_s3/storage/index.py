"""The index of a checkpoint (``.metadata``, written by torch): its content and its consistency."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_s3.storage.archive import Archive
from megatron_s3.storage.errors import Damaged, unreadable
from megatron_s3.storage.layout import INDEX

__all__ = ["archives", "check", "read"]


def read(folder: Path) -> Any:
    """Returns the index of an iteration, torch's ``Metadata``.

    The file is unpickled, as torch does: read only checkpoints that you trust.

    Raises:
        Damaged: it cannot be read.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        index = FileSystemReader(folder).read_metadata()
        index.state_dict_metadata.items()
        index.storage_data.items()
    except Exception as error:
        raise unreadable(folder / INDEX, error) from error
    return index


def archives(folder: Path) -> list[Archive]:
    """Returns the archives of all tensors' shards and objects that the index lists.

    Raises:
        Damaged: it cannot be read.
    """
    index = read(folder)
    try:
        return list(_archives(folder, index))
    except Exception as error:  # a damaged pickle may raise anything
        raise unreadable(folder / INDEX, error) from error


def _archives(folder: Path, index: Any) -> Iterator[Archive]:
    sizes = {
        (name, tuple(chunk.offsets)): math.prod(chunk.sizes) * entry.properties.dtype.itemsize
        for name, entry in index.state_dict_metadata.items()
        for chunk in getattr(entry, "chunks", ())
    }
    for key, place in index.storage_data.items():
        if getattr(place, "transform_descriptors", None):
            continue  # compressed, which Megatron does not write
        size = sizes.get((key.fqn, tuple(key.offset or ())))
        yield Archive(folder / place.relative_path, int(place.offset), int(place.length), size)


def check(folder: Path) -> None:
    """Checks that the index is consistent: each shard of a tensor is stored exactly once.

    Raises:
        Damaged: it is not.
    """
    path = folder / INDEX
    index = read(folder)
    try:
        expected = {
            (name, None if chunk is None else tuple(chunk.offsets))
            for name, entry in index.state_dict_metadata.items()
            for chunk in getattr(entry, "chunks", [None])  # an object has no chunks
        }
        found = {(i.fqn, None if i.offset is None else tuple(i.offset)) for i in index.storage_data}
        if expected != found:
            (name, _), *_ = sorted(expected ^ found, key=str)
            raise Damaged(f"{path} is damaged: it does not describe {name} exactly once")
        for name, entry in index.state_dict_metadata.items():
            if hasattr(entry, "chunks"):
                _check_chunks(path, name, entry)
        at: dict[str, int] = {}
        for place in sorted(
            index.storage_data.values(), key=lambda place: (place.relative_path, place.offset)
        ):
            if place.offset != at.get(place.relative_path, 0):
                raise Damaged(
                    f"{path} is damaged: its parts of {place.relative_path} overlap or leave gaps"
                )
            at[place.relative_path] = place.offset + place.length
        for name, size in at.items():
            file = folder / name
            if file.is_file() and file.stat().st_size > size:
                raise Damaged(
                    f"{path} is damaged: it describes {size:,} bytes of {file}, which is longer"
                )
    except Damaged:
        raise
    except Exception as error:
        raise unreadable(path, error) from error


def _check_chunks(path: Path, name: str, entry: Any) -> None:
    inside = all(
        0 <= offset <= offset + size <= whole
        for chunk in entry.chunks
        for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
    )
    if not inside or sum(math.prod(c.sizes) for c in entry.chunks) != math.prod(entry.size):
        raise Damaged(f"{path} is damaged: the shards of {name} do not make up the tensor")
