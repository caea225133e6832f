"""Any update rule over a list of parameters with torch operations, in bounded memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["step"]

# Temporaries are at most twelve tensors of this many elements: on a CPU they stay in cache, on a
# GPU one chunk fills the machine.
_CHUNK = {"cpu": 1 << 16}
_LARGE_CHUNK = 1 << 22


@torch.no_grad()
def step(
    rule: Callable[..., Tensor],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    *,
    lr: float | Tensor,
    weight_decay: float,
    observe: Callable[[Tensor], None] | None = None,
    **hyperparameters: object,
) -> None:
    """Applies ``x <- (1 - lr * weight_decay) * x - lr * rule(g, *state)`` to every parameter.

    Args:
        rule: see :mod:`megatron_s3.rules`.
        params: the parameters ``x``, advanced in place; any floating dtype, shape and layout.
        grads: one gradient a parameter, of the same shape; any floating dtype.
        states: the rule's state tensors of each parameter, in the rule's order, advanced in place;
            their dtype is the one computed in.
        lr: learning rate, a number or a 0-dim tensor on the parameters' device.
        weight_decay: decoupled weight decay.
        observe: called with each chunk's update ``u`` before it is applied; must not change it.
        **hyperparameters: passed on to the rule.

    Temporary memory is bounded by one chunk of elements, unless a parameter's memory is not dense
    (an expanded or sliced view): then it is bounded by that parameter.
    """
    for param, grad, state in zip(params, grads, states, strict=True):
        order = sorted(range(param.dim()), key=param.stride, reverse=True)
        x, *s = (_Flat(t, order) for t in (param, *state))
        g = _Flat(grad, order).flat
        dtype = state[0].dtype if state else torch.float32
        for begin in range(0, param.numel(), size := _CHUNK.get(param.device.type, _LARGE_CHUNK)):
            part = slice(begin, begin + size)
            update = rule(g[part].to(dtype), *(t.flat[part] for t in s), **hyperparameters)
            if observe is not None:
                observe(update)
            target = x.flat[part].to(dtype)  # x itself where the dtypes agree
            target.mul_(1 - lr * weight_decay).sub_(update.mul_(lr))
            if target.dtype != param.dtype:
                x.flat[part] = target
        for t in (x, *s):
            t.write_back()


class _Flat:
    """A tensor's elements as one 1-d tensor in a given order of dimensions.

    The order is that of the parameter's memory, so that ``flat`` is a view of a dense parameter in
    any layout (channels_last, transposed); what is laid out otherwise is copied, and written back.
    """

    def __init__(self, tensor: Tensor, order: Sequence[int]) -> None:
        self._ordered = tensor.permute(order)
        self.flat = self._ordered.reshape(-1)

    def write_back(self) -> None:
        if self.flat.data_ptr() != self._ordered.data_ptr():
            self._ordered.copy_(self.flat.view(self._ordered.shape))
