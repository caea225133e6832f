"""Any update rule over a list of parameters with torch operations, in bounded memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_s3.kernels.operands import Operands
from megatron_s3.kernels.statistics import Statistics, of_chunk

__all__ = ["step"]

# Temporaries are at most fourteen tensors of this many elements: on a CPU they stay in cache, on a
# GPU one chunk fills the machine.
_CHUNK = {"cpu": 1 << 16}
_LARGE_CHUNK = 1 << 22


@torch.no_grad()
def step(
    rule: Callable[..., Tensor],
    operands: Sequence[Operands],
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    statistics: Statistics | None = None,
    **hyperparameters: object,
) -> None:
    """Applies ``x <- (1 - lr * weight_decay) * x - lr * rule(g, *state)`` to every parameter.

    It computes in float64 for float64 parameters and in float32 for all others; what has another
    dtype is converted chunk by chunk, and rounded to nearest on its way back.

    Args:
        rule: see :mod:`megatron_s3.rules`.
        operands: parameters, gradients and states of any floating dtype.
        lr: learning rate, a number or a 0-dim tensor on the parameters' device.
        weight_decay: decoupled weight decay.
        statistics: what to add the step's to.
        **hyperparameters: passed on to the rule.
    """
    for o in operands:
        dtype = torch.float64 if o.param.dtype == torch.float64 else torch.float32
        size = _CHUNK.get(o.param.device.type, _LARGE_CHUNK)
        for begin in range(0, o.param.numel(), size):
            part = slice(begin, begin + size)
            # The tensors themselves where the dtypes agree, copies to be stored elsewhere.
            state = [tensor[part].to(dtype) for tensor in o.state]
            x = o.param[part].to(dtype)
            grad = o.grad[part].to(dtype)
            update = rule(grad, *state, **hyperparameters)
            step = update * lr if statistics is not None else update.mul_(lr)
            x.mul_(1 - lr * weight_decay).sub_(step)
            if statistics is not None:
                # Not torch.tensor, which on a GPU waits for the copy.
                row = torch.full((1,), o.row, device=x.device)
                statistics.add(of_chunk(update, grad, x), row)
            for tensor, new in zip((o.param, *o.state), (x, *state), strict=True):
                if tensor.dtype != dtype:
                    tensor[part] = new
            if o.model_param is not None:
                o.model_param[part] = x
