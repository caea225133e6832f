"""The PyTorch implementation of a step: any update rule, with bounded temporary memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
    statistics: Statistics | None = None,
    **hyperparameters: object,
) -> None:
    """Applies ``x <- (1 - lr * weight_decay) * x - lr * rule(g, *state)`` to every parameter.

    It computes in float64 for float64 parameters and in float32 for all others.  Tensors of other
    dtypes are converted chunk by chunk, and the results are rounded to nearest.

    Args:
        rule: see :mod:`megatron_s3.rules`.
        operands: parameters, gradients and states of any floating dtype.
        lr: learning rate, a number or a 0-dim tensor on the parameters' device.
        weight_decay: decoupled weight decay.
        statistics: the statistics to which those of the step are added.
        **hyperparameters: passed on to the rule.
    """
    for o in operands:
        dtype = torch.float64 if o.param.dtype == torch.float64 else torch.float32
        size = _CHUNK.get(o.param.device.type, _LARGE_CHUNK)
        for begin in range(0, o.param.numel(), size):
            part = slice(begin, begin + size)
            # These are the tensors themselves where the dtypes agree, else copies to store later.
            state = [tensor[part].to(dtype) for tensor in o.state]
            x = o.param[part].to(dtype)
            grad = o.grad[part].to(dtype)
            update = rule(grad, *state, **hyperparameters)
            step = update * lr if statistics is not None else update.mul_(lr)
            x.mul_(1 - lr * weight_decay).sub_(step)
            if statistics is not None:
                # torch.tensor would wait for the copy to a GPU.
                row = torch.full((1,), o.row, device=x.device)
                statistics.add(of_chunk(update, grad, x), row)
            for tensor, new in zip((o.param, *o.state), (x, *state), strict=True):
                if tensor.dtype != dtype:
                    tensor[part] = new
            if o.model_param is not None:
                o.model_param[part] = x
