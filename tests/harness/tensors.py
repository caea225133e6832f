"""Tensors of tests: made, compared to the bit, and read from a checkpoint."""

import contextlib
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_s3.kernels.compact import FRACTION, split, values_of_fractions
from megatron_s3.kernels.operands import Operands

from .models import ITERATIONS

__all__ = [
    "assert_bitwise_equal",
    "assert_same",
    "bits",
    "bitwise",
    "compact",
    "contents",
    "copied",
    "misaligned",
    "numbers",
    "random",
    "same",
    "tensors",
    "written",
]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns normally distributed numbers, the same for the same seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def numbers(
    count: int, seed: int, dtype: torch.dtype = torch.float32, magnitudes: float = 38
) -> torch.Tensor:
    """Returns numbers from 10**-magnitudes to 10**magnitudes, denormals and zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.rand(count, generator=generator).mul_(2).sub_(1).mul_(magnitudes)
    values = torch.randn(count, generator=generator) * 10.0**exponent
    values[torch.rand(count, generator=generator) < 0.1] = 0.0
    values[torch.rand(count, generator=generator) < 0.05] = -0.0
    values[torch.rand(count, generator=generator) < 0.05] *= 2.0**-130
    return values.to(dtype)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy whose memory begins one element after what the allocator aligned."""
    return torch.cat([tensor[:0].new_zeros(1), tensor])[1:]


def copied(operands: Operands) -> Operands:
    """Returns the same operands in memory of their own."""
    model = None if operands.model_param is None else operands.model_param.clone()
    return replace(
        operands,
        param=operands.param.clone(),
        grad=operands.grad.clone(),
        state=tuple(tensor.clone() for tensor in operands.state),
        model_param=model,
    )


def compact(
    count: int,
    *,
    grad: torch.dtype = torch.float32,
    norm: torch.dtype = torch.bfloat16,
    remainders: bool = False,
    fractions: bool = True,
    seed: int = 0,
) -> Operands:
    """Returns S3's operands with fractions and remainders, of all magnitudes, NaN and inf.

    Args:
        count: number of elements.
        grad, norm: dtypes of the gradient and of ``exp_pnorm``.
        remainders: whether the main parameter holds remainders of the model's.
        fractions: whether ``exp_avg`` holds fractions of ``exp_pnorm``.
        seed: seed of all values.
    """
    g, r = numbers(count, seed + 1, grad), numbers(count, seed + 3, norm).abs()
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (count,), generator=generator).to(FRACTION)
    if count > 20:
        g[[2, 7, 9]] = torch.tensor([math.nan, math.inf, -math.inf]).to(grad)
        r[3], r[5], g[4] = math.nan, math.inf, 0.0
        if grad == torch.float32:  # a GPU's usual NaN, which an addition to its bits would lose
            g.view(torch.int32)[8] = 0x7FFFFFFF
    x = torch.randn(count, generator=generator)
    m = codes if fractions else values_of_fractions(codes.clamp(min=-127), r).to(norm)
    high, low = split(x)
    return Operands(
        misaligned(low if remainders else x),
        misaligned(g),
        (misaligned(m), misaligned(r)),
        misaligned(high) if remainders else None,
    )


def written(operands: Operands) -> list[torch.Tensor]:
    """Returns what a kernel writes: the parameter, the states and, if there is one, the model's."""
    model = [] if operands.model_param is None else [operands.model_param]
    return [operands.param, *operands.state, *model]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bits, the sign of zero included; every NaN alike (torch's have several)."""
    if not tensor.is_floating_point():
        return tensor
    integers = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
    return integers.masked_fill(tensor.isnan(), -1)


def assert_same(actual: Operands, expected: Operands) -> None:
    """Fails with the place of the first bit that differs in what a kernel writes."""
    names = ["param", *(f"state {i}" for i in range(len(actual.state))), "model_param"]
    for name, ours, theirs in zip(names, written(actual), written(expected), strict=False):
        differ = (bits(ours) != bits(theirs)).nonzero().view(-1)
        assert not len(differ), (
            f"{name}: {len(differ)} of {len(ours)} differ, first {differ[0]}: "
            f"{ours[differ[0]]} for {theirs[differ[0]]}"
        )


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
