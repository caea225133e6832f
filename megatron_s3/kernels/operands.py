"""Operands of a step: tensors of any shape and layout as flat memory."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_s3.kernels.compact import FRACTION, REMAINDER

__all__ = ["Operands", "fault", "flatten", "local", "size_of", "write_back"]

#: Numbers of the dtypes that the kernels take (the same as in :file:`step.cpp`).
_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, FRACTION: 4, REMAINDER: 5}
_SIZES = {code: dtype.itemsize for dtype, code in _CODES.items()}


@dataclass(slots=True)
class Operands:
    """The tensors of one parameter (or shard): 1-d, dense, of equal length, on one device.

    Attributes:
        param: the parameter ``x``, updated in place; the main parameter where there is one, or its
            remainders (int16) of ``model_param``, which is then part of it.
        grad: the gradient, in its own floating-point dtype.
        state: the rule's state tensors in its order, updated in place; a state in int8 holds
            fractions of the one after it.
        model_param: a tensor that also receives the new ``x``, rounded to its dtype; or None.
        row: the row of the step's statistics to which this parameter adds.
        read: address and dtype of the gradient's memory.
        written: the number of elements, then address and dtype of ``param``, of ``model_param`` and
            of every state.  An address is 0 if the tensor's elements are not in its memory.  Dtypes
            have the kernels' numbers; others have their size in bytes, negated.
    """

    param: Tensor
    grad: Tensor
    state: tuple[Tensor, ...]
    model_param: Tensor | None = None
    row: int = 0
    read: tuple[int, ...] = field(init=False, repr=False, compare=False)
    written: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        model = self.model_param
        written: tuple[int, ...] = (self.param.numel(), *_place(self.param))
        written += (0, 0) if model is None else _place(model)
        for tensor in self.state:
            written += _place(tensor)
        self.read, self.written = _place(self.grad), written


def _place(tensor: Tensor) -> tuple[int, int]:
    dtype = tensor.dtype
    return _address(tensor), _CODES.get(dtype) or -dtype.itemsize


def _address(tensor: Tensor) -> int:
    """Returns the address of the elements; 0 if they are not in the tensor's memory."""
    if (type(tensor) is not Tensor and not _has_memory(type(tensor))) or tensor.is_neg():
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:  # the tensors of torch.func's transforms have no address
        return 0


@functools.cache
def _has_memory(kind: type[Tensor]) -> bool:
    """Returns whether the elements of a class's tensors are in memory, not computed by its code."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def size_of(code: int) -> int:
    """Returns the bytes of an element, from the number of its dtype in :class:`Operands`."""
    return _SIZES.get(code, -code)


_GRAD = (torch.float32, torch.bfloat16, torch.float16)
_PARAM = _GRAD
_STATE: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
#: Dtypes of a state that another one follows.
_FOLLOWED = (*_STATE, FRACTION)
#: Dtypes of a parameter whose copy in the model is in bfloat16.
_MAIN = (*_PARAM, REMAINDER)


def fault(operands: Sequence[Operands], device: str, states: int) -> str | None:
    """Returns a description of an operand that a fused kernel cannot take, or None.

    Args:
        operands: the operands of the step.
        device: the kernel's device type.
        states: the number of state tensors of the rule.
    """
    if not operands:
        return None
    place = operands[0].param.device
    right = place.type == device
    for o in operands:
        if len(o.state) != states:
            return f"{len(o.state)} state tensors where its rule has {states}"
        count = o.param.numel()
        for name, tensor, dtypes, address in _tensors(o):
            if tensor.dtype not in dtypes:
                return f"a {name} of {tensor.dtype}"
            if not right or tensor.device != place:
                other = f" with a param on {place}" if tensor.device.type == device else ""
                return f"a {name} on {tensor.device}{other}"
            if not tensor.is_contiguous():
                return f"a {name} that is not contiguous"
            if tensor.numel() != count:
                return f"a {name} of {tensor.numel()} elements with a param of {count}"
            if not address and count:
                kind = "negated view" if tensor.is_neg() else type(tensor).__name__
                return f"a {name} whose elements are not in its memory ({kind})"
    return None


def _tensors(o: Operands) -> list[tuple[str, Tensor, tuple[torch.dtype, ...], int]]:
    """Returns the name of each tensor, the dtypes that it may have, and its address."""
    model, addresses = o.model_param, o.written[1::2]
    has_bf16 = model is not None and model.dtype == torch.bfloat16
    found: list[tuple[str, Tensor, tuple[torch.dtype, ...], int]] = [
        ("param", o.param, _MAIN if has_bf16 else _PARAM, addresses[0]),
        ("gradient", o.grad, _GRAD, o.read[0]),
    ]
    for i, state in enumerate(o.state):
        followed = i + 1 < len(o.state) and o.state[i + 1].dtype in _STATE
        found.append(("state", state, _FOLLOWED if followed else _STATE, addresses[2 + i]))
    if model is not None:
        found.append(("model_param", model, _GRAD, addresses[1]))
    return found


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor (which may be empty), or any other tensor itself.

    It waits for a tensor that a collective operation is still filling (an AsyncCollectiveTensor).
    """
    kind = type(tensor)
    if kind is Tensor or kind is Parameter:
        return tensor
    if (to_local := getattr(tensor, "to_local", None)) is not None:
        tensor = to_local()
    wait = getattr(tensor, "trigger_wait", None)
    return tensor if wait is None else wait()


def flatten(
    param: Tensor,
    grad: Tensor,
    state: Sequence[Tensor],
    model_param: Tensor | None = None,
    row: int = 0,
) -> tuple[Operands, list[tuple[Tensor, Tensor]]]:
    """Returns a parameter's operands, and the copies that :func:`write_back` has to write back.

    The elements are in the order of the parameter's memory.  So nothing is copied for a dense
    parameter in any layout (channels_last, transposed) if its state has the same layout; tensors of
    another layout are copied.

    Args:
        param, grad, state: tensors of one shape; all or none of them are DTensors of one layout.
        model_param: a tensor of as many elements: of the same shape, or 1-d in the parameter's
            order.
        row: the row of the statistics.
    """
    param, grad, *state = tensors = [local(tensor) for tensor in (param, grad, *state)]
    model_param = None if model_param is None else local(model_param)
    if all(map(Tensor.is_contiguous, tensors)):
        if param.dim() == 1 and (model_param is None or _is_flat(model_param)):
            return Operands(param, grad, tuple(state), model_param, row), []
        flat = [tensor.view(-1) for tensor in tensors]
        copies = []
        order = list(range(param.dim()))
    else:
        order = sorted(range(param.dim()), key=param.stride, reverse=True)
        ordered = [tensor.permute(order) for tensor in tensors]
        # reshape(-1) returns a 1-d tensor with gaps itself; contiguous() copies it.
        flat = [tensor.reshape(-1).contiguous() for tensor in ordered]
        copies = [
            (f, o)
            for f, o in zip(flat, ordered, strict=True)
            if f is not flat[1] and _is_copy(f, o)
        ]
    if model_param is not None and not _is_flat(model_param):
        o = model_param.permute(order) if model_param.dim() == len(order) else model_param
        model_param = o.reshape(-1).contiguous()
        if _is_copy(model_param, o):
            copies.append((model_param, o))
    return Operands(flat[0], flat[1], tuple(flat[2:]), model_param, row), copies


def _is_flat(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and tensor.is_contiguous()


def _is_copy(flat: Tensor, tensor: Tensor) -> bool:
    """Returns whether flattening copied, judged by the address or, without one, by the layout."""
    address = _address(tensor)
    return _address(flat) != address if address else not tensor.is_contiguous()


@torch.no_grad()
def write_back(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Writes the results of a step from the copies to the tensors that were copied."""
    for flat, ordered in copies:
        ordered.copy_(flat.view(ordered.shape))
