"""What a step works on: tensors as flat memory, whatever their shapes and layouts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Operands", "fault", "flatten", "local", "write_back"]


@dataclass(frozen=True, slots=True)
class Operands:
    """One parameter (or shard) of a step: 1-d dense tensors of equal length on one device.

    Attributes:
        param: the parameter ``x``, advanced in place; a main parameter where there is one.
        grad: the gradient, as it lies; any floating dtype.
        state: the rule's state tensors in its order, advanced in place.
        model_param: a tensor that is also given the new ``x``, rounded to its dtype; or None.
        row: of the step's statistics, which this parameter adds to.
    """

    param: Tensor
    grad: Tensor
    state: tuple[Tensor, ...]
    model_param: Tensor | None = None
    row: int = 0


_PARAM = (torch.float32,)
_GRAD = (torch.float32, torch.bfloat16, torch.float16)
_STATE = (torch.float32, torch.bfloat16)


def fault(operands: Sequence[Operands], device: str, states: int) -> str | None:
    """What a fused kernel cannot take of these operands, or None.

    Args:
        operands: what a step is to work on.
        device: the kernel's type of device.
        states: how many state tensors its rule has.
    """
    for o in operands:
        # Most often all is well, and this is on the way of every step: plain checks first.
        count, model, grad = o.param.numel(), o.model_param, o.grad
        if (
            len(o.state) == states
            and _fits(o.param, _PARAM, device, count)
            and _fits(grad, _GRAD, device, count)
            and all(_fits(state, _STATE, device, count) for state in o.state)
            and (model is None or _fits(model, _GRAD, device, count))
        ):
            continue
        if len(o.state) != states:
            return f"{len(o.state)} state tensors, its rule has {states}"
        named = [("param", o.param, _PARAM), ("gradient", grad, _GRAD)]
        named += [("state", tensor, _STATE) for tensor in o.state]
        if o.model_param is not None:
            named.append(("model_param", o.model_param, _GRAD))
        for name, tensor, dtypes in named:
            if tensor.dtype not in dtypes:
                return f"a {name} of {tensor.dtype}"
            if tensor.device.type != device:
                return f"a {name} on {tensor.device}"
            if not tensor.is_contiguous():
                return f"a {name} that is not contiguous"
            if tensor.numel() != count:
                return f"a {name} of {tensor.numel()} elements with a param of {count}"
    return None


def _fits(tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: str, count: int) -> bool:
    return (
        tensor.dtype in dtypes
        and tensor.is_contiguous()
        and tensor.numel() == count
        and tensor.device.type == device
    )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, in its memory (it may be empty); other tensors as they are."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def flatten(
    param: Tensor,
    grad: Tensor,
    state: Sequence[Tensor],
    model_param: Tensor | None = None,
    row: int = 0,
) -> tuple[Operands, list[tuple[Tensor, Tensor]]]:
    """Operands of a parameter, and the copies that a step on them leaves to :func:`write_back`.

    Elements are taken in the order of the parameter's memory, so that nothing is copied for a dense
    parameter in any layout (channels_last, transposed) whose state has the same; what is laid out
    otherwise is copied.

    Args:
        param, grad, state: of one shape, and all DTensors of one layout or none.
        model_param: of as many elements; of the same shape, or 1-d in the parameter's order.
        row: of the statistics.
    """
    param, grad, *state = tensors = [local(tensor) for tensor in (param, grad, *state)]
    model_param = None if model_param is None else local(model_param)
    if all(map(Tensor.is_contiguous, tensors)):
        if param.dim() == 1 and (model_param is None or model_param.dim() == 1):
            return Operands(param, grad, tuple(state), model_param, row), []
        flat = [tensor.view(-1) for tensor in tensors]
        copies = []
        order = list(range(param.dim()))
    else:
        order = sorted(range(param.dim()), key=param.stride, reverse=True)
        ordered = [tensor.permute(order) for tensor in tensors]
        flat = [tensor.reshape(-1) for tensor in ordered]
        copies = [
            (f, o)
            for f, o in zip(flat, ordered, strict=True)
            if f.data_ptr() != o.data_ptr() and f is not flat[1]
        ]
    if model_param is not None and model_param.dim() != 1:
        o = model_param.permute(order) if model_param.dim() == len(order) else model_param
        model_param = o.reshape(-1)
        if model_param.data_ptr() != o.data_ptr():
            copies.append((model_param, o))
    return Operands(flat[0], flat[1], tuple(flat[2:]), model_param, row), copies


@torch.no_grad()
def write_back(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Puts what a step left in copies to where it belongs."""
    for flat, ordered in copies:
        ordered.copy_(flat.view(ordered.shape))
