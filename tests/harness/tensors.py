"""Tensors of tests: made, compared to the bit, and read from a checkpoint."""

import contextlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .models import ITERATIONS

__all__ = ["assert_bitwise_equal", "bitwise", "contents", "random", "same", "tensors"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns normally distributed numbers, the same for the same seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def bitwise(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether two tensors hold the same bits, the shape aside."""
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def same(one: Any, other: Any) -> bool:
    """Returns whether two objects are alike, the tensors in them bitwise; a NaN is a NaN."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and bitwise(one, other)
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dict__") and not isinstance(one, type):
        return same(vars(one), vars(other))
    with contextlib.suppress(Exception):  # of arrays, the truth of what == returns
        if one == other:
            return True
    return pickle.dumps(one) == pickle.dumps(other)


def tensors(checkpoint: Path, iteration: int | None = ITERATIONS) -> dict[str, torch.Tensor]:
    """Returns every tensor of an iteration by its name there; of the folder itself if None."""
    folder = checkpoint if iteration is None else checkpoint / f"iter_{iteration:07d}"
    return contents(folder, objects=False)


def contents(folder: Path, *, objects: bool = True) -> dict[str, Any]:
    """Returns what the files of torch.distributed.checkpoint in a folder hold, by its name there.

    Args:
        folder: of one iteration.
        objects: whether to unpickle what is no tensor, too.
    """
    reader = dcp.FileSystemReader(folder)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if objects or isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def assert_bitwise_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Fails with the names of the tensors that differ."""
    assert one.keys() == other.keys()
    different = [name for name in one if not bitwise(one[name], other[name])]
    assert not different, different
