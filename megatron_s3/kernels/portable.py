"""The PyTorch implementation of a step: any update rule, with bounded temporary memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_s3.kernels.compact import REMAINDER, join, read_states, split, write_states
from megatron_s3.kernels.operands import Operands
from megatron_s3.kernels.statistics import Statistics, of_chunk

__all__ = ["step"]

# The temporaries are at most fourteen tensors of this many elements: on a CPU they stay in the
# cache, and on a GPU one chunk occupies the whole device.
_CHUNK = {"cpu": 1 << 16}
_LARGE_CHUNK = 1 << 22


@torch.no_grad()
def step(
    rule: Callable[..., Tensor],
    operands: Sequence[Operands],
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    seed: int = 0,
    statistics: Statistics | None = None,
    **hyperparameters: object,
) -> None:
    """Applies ``x <- (1 - lr * weight_decay) * x - lr * rule(g, *state)`` to every parameter.

    It computes in float64 for float64 parameters and in float32 for all others.  Tensors of other
    dtypes are converted chunk by chunk, and the results are rounded to nearest; see
    :mod:`megatron_s3.kernels.compact` for fractions and remainders.

    Args:
        rule: see :mod:`megatron_s3.rules`.
        operands: parameters, gradients and states of any floating dtype; a state may hold fractions
            (int8), and a parameter remainders (int16) of its ``model_param`` in bfloat16.
        lr: learning rate, a number or a 0-dim tensor on the parameters' device.
        weight_decay: decoupled weight decay.
        seed: the number of the step, on which the noise of stochastic rounding depends.
        statistics: the statistics to which those of the step are added.
        **hyperparameters: passed on to the rule.
    """
    for o in operands:
        dtype = torch.float64 if o.param.dtype == torch.float64 else torch.float32
        size = _CHUNK.get(o.param.device.type, _LARGE_CHUNK)
        for begin in range(0, o.param.numel(), size):
            part = slice(begin, begin + size)
            stored = [tensor[part] for tensor in o.state]
            # These are the tensors themselves where the dtypes agree, else copies to store later.
            state = read_states(stored, dtype)
            x = _read_param(o, part, dtype)
            grad = o.grad[part].to(dtype)
            update = rule(grad, *state, **hyperparameters)
            x.mul_(1 - lr * weight_decay).sub_(update * lr)  # it may be a state or the gradient
            if statistics is not None:
                # torch.tensor would wait for the copy to a GPU.
                row = torch.full((1,), o.row, device=x.device)
                statistics.add(of_chunk(update, grad, x), row)
            write_states(stored, state, grad, seed)
            _write_param(o, part, x)


def _read_param(o: Operands, part: slice, dtype: torch.dtype) -> Tensor:
    if o.param.dtype == REMAINDER and o.model_param is not None:
        return join(o.model_param[part], o.param[part])
    return o.param[part].to(dtype)


def _write_param(o: Operands, part: slice, x: Tensor) -> None:
    if o.param.dtype == REMAINDER and o.model_param is not None:
        o.model_param[part], o.param[part] = split(x)
        return
    if o.param.dtype != x.dtype:
        o.param[part] = x
    if o.model_param is not None:
        o.model_param[part] = x
