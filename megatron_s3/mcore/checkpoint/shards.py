"""DistributedOptimizer's shards in a checkpoint: exactly the elements that the ranks hold.

Megatron puts the parameters of a buffer into buckets, starts each parameter at a multiple of 64
elements, and pads each bucket to a multiple of the number of ranks. The wrappers here are for any
optimizer, Adam too.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_s3.mcore.one_pass import is_plain
from megatron_s3.mcore.state import running

__all__ = [
    "get_parameter_state_dp_reshardable",
    "note_unlike",
    "sharded_param_state_dp_reshardable",
    "sharded_param_state_fully_reshardable",
    "unlike_weights",
]


def sharded_param_state_fully_reshardable(
    original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wraps the cutting of gathered buffers into tensors of the parameters' shapes.

    The buffers are gathered without the padding of buckets, but up to 0.19.2 they are cut at
    positions that include it. Later releases correct this by a parameter's bucket, which is the
    first here.
    """
    with _counted_without_padding(optimizer.buffers):
        return original(optimizer, *args, **kwargs)


@contextlib.contextmanager
def _counted_without_padding(buffers: Iterable[Any]) -> Iterator[None]:
    """Sets the parameters' positions in the buffers to those without padding of buckets."""
    kept = [(buffer, buffer.param_index_map) for buffer in buffers]
    try:
        for buffer, places in kept:
            padding, before = 0, {}
            for bucket in buffer.buckets:
                before[bucket.bucket_id] = padding
                padding += bucket.grad_data.numel() - bucket.numel_unpadded
            buffer.param_index_map = {
                param: (start - before[bucket], end - before[bucket], 0)
                for param, (start, end, bucket) in places.items()
            }
        yield
    finally:
        for buffer, places in kept:
            buffer.param_index_map = places


def get_parameter_state_dp_reshardable(original: Callable[..., Any], optimizer: Any) -> Any:
    """Wraps the list of a rank's elements of each bucket; adds the gaps between parameters.

    Megatron adds them later, with undefined memory and up to the end of a rank's shard, which may
    be in the padding. It treats a shard that is only padding as an error.
    """
    state = original(optimizer)
    rank, ranks = optimizer.data_parallel_group.rank(), optimizer.data_parallel_group.size()
    buckets = [
        (held, bucket)
        for number, buffer in enumerate(optimizer.buffers)
        for of_dtype in state[number].values()
        for held, bucket in zip(of_dtype, buffer.buckets, strict=True)
    ]
    like = next((parts[0] for parts, _ in buckets if parts), None) or _like(optimizer)
    for held, bucket in buckets:
        shard = bucket.grad_data.numel() // ranks
        held[:] = _without_gaps(held, min(shard, bucket.numel_unpadded - rank * shard), like)
    return state


def sharded_param_state_dp_reshardable(
    original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wraps the writing of :func:`get_parameter_state_dp_reshardable`.

    A bucket without data would be missing in the list that is loaded, so its buckets are numbered,
    which is how they are looked up.
    """
    state = original(optimizer, *args, **kwargs)
    for number in range(len(optimizer.buffers)):
        state[number] = {
            dtype: dict(enumerate(buckets)) for dtype, buckets in state[number].items()
        }
    return state


def _like(optimizer: Any) -> dict[str, Any]:
    """Returns tensors with an optimizer's names and dtypes, if this rank holds none."""
    names = getattr(optimizer, "optimizer_state_keys", ("exp_avg", "exp_avg_sq"))
    dtype_of = getattr(optimizer, "_get_state_key_dtype", lambda name: torch.float32)
    device = optimizer.buffers[0].grad_data.device
    dtypes = {"param": torch.float32} | {name: dtype_of(name) for name in names}
    return {name: torch.zeros(1, dtype=dtype, device=device) for name, dtype in dtypes.items()}


def _without_gaps(
    held: list[dict[str, Any]], end: int, like: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns the parts of a shard and zeros between them, up to ``end``, which may be below 0."""

    def zeros(start: int, stop: int) -> dict[str, Any]:
        tensors = {k: v for k, v in like.items() if isinstance(v, Tensor) and v.dim()}
        found = {name: tensor.new_zeros(stop - start) for name, tensor in tensors.items()}
        return found | {"gbuf_local_start": start, "gbuf_local_end": stop, "padding": True}

    parts, at = [], 0
    for part in held:
        if part["gbuf_local_start"] > at:
            parts.append(zeros(at, part["gbuf_local_start"]))
        parts.append(part)
        at = part["gbuf_local_end"]
    if at < end:
        parts.append(zeros(at, end))
    # An entry without data, because Megatron rejects an empty list.
    return parts or [{"gbuf_local_start": 0, "gbuf_local_end": 0, "padding": True}]


def note_unlike(optimizer: Any, model_param: Parameter, tensors: dict[str, Any]) -> None:
    """Records a parameter for :func:`unlike_weights`, before its main parameter is loaded.

    Args:
        optimizer: a DistributedOptimizer.
        model_param: the model's parameter, whose weights are loaded.
        tensors: the tensors that are loaded for this rank's shard of it; ``param`` is the main
            parameter.
    """
    main = tensors.get("param")
    if not isinstance(main, Tensor) or not main.is_floating_point() or not is_plain(model_param):
        return
    place = optimizer._get_model_param_range_map(model_param)["param"]
    weight = model_param.detach().reshape(-1)[place.start : place.end].float()
    main = main.detach().reshape(-1).to(weight)
    if main.numel() != weight.numel():
        return
    # More than the rounding of any weight precision, including 4 bits.
    differ = (main - weight).abs() > torch.maximum(main.abs(), weight.abs()) / 4 + 1e-6
    if 2 * int(differ.sum()) > weight.numel():
        running().unlike.append(model_param)


def unlike_weights(model: Iterable[torch.nn.Module]) -> list[str]:
    """Returns names of parameters whose main parameters, as last loaded, differ from the weights.

    More than half of their elements differ by more than rounding explains.

    Args:
        model: the chunks of the model, for the names.
    """
    training = running()
    found, training.unlike = training.unlike, []
    names = {param: name for chunk in model for name, param in chunk.named_parameters()}
    return [names.get(param, "a parameter") for param in found]
