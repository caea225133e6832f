"""Checks of learning rates, weight decays and states."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

from megatron_s3.optimizers.description import LARGEST, plain

__all__ = [
    "check_decay",
    "check_finite",
    "grad_fault",
    "largest",
    "of_shape",
    "placements",
    "rate",
    "rates",
    "shares_memory",
    "state_fault",
]


def largest(params: list[Tensor]) -> float:
    """Returns the largest number that the arithmetic of these parameters' steps can represent."""
    double = params and all(param.dtype == torch.float64 for param in params)
    return math.inf if double else LARGEST


def rate(name: str, value: Any, most: float = LARGEST) -> float | Tensor | None:
    """Returns a learning rate or weight decay for a step: a number or a 0-dim tensor.

    Args:
        name: its name in messages.
        value: a number (see :func:`~megatron_s3.optimizers.description.plain`), a tensor of one
            element, or None.  A tensor's value is checked only if the tensor is on the CPU.
        most: the largest value allowed, see :func:`largest`.

    Raises:
        ValueError: the value is negative, too large, not finite or not a real number.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, not of shape {tuple(value.shape)}")
        if value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{name} must be a real number, not a tensor of {value.dtype}")
        if type(value) in (Tensor, Parameter) and value.device.type == "cpu":
            _check_range(name, value.detach().item(), most)
        return value.reshape(())
    number = plain(value)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
    _check_range(name, number, most, value)
    return number


def rates(group: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Returns a group's learning rate, weight decay and seed of stochastic rounding for a step.

    Args:
        group: the param group.
        step: the number of the step, counted from 1.
    """
    found = {name: rate(name, group[name], math.inf) for name in ("lr", "weight_decay")}
    return found | {"seed": step}


def _check_range(name: str, number: float, most: float, value: Any = None) -> None:
    value = number if value is None else value
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, not {value!r}")
    if number > most:
        raise ValueError(f"{name} must be at most {most:.8g}, the largest float32, not {value!r}")


def check_decay(lr: float | Tensor | None, weight_decay: float | Tensor, most: float) -> None:
    """Raises ValueError if both are numbers and their product is too large for a step."""
    if isinstance(lr, int | float) and isinstance(weight_decay, int | float):
        product = float(lr) * float(weight_decay)
        if not product <= most or math.isinf(product):
            raise ValueError(
                f"lr * weight_decay must be at most {min(most, 1e308):.8g}, not {lr!r} * "
                f"{weight_decay!r}"
            )


def placements(tensor: Tensor) -> tuple[Any, ...] | None:
    """Returns how a DTensor is laid out over its mesh; None for other tensors."""
    return getattr(tensor, "placements", None)


def shares_memory(tensor: Tensor) -> bool:
    """Returns whether elements of a tensor lie in the same memory (expand)."""
    return any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def of_shape(param: Tensor) -> str:
    """Returns ", of shape ...,", or "" for a parameter that is not initialized yet."""
    return "" if is_lazy(param) else f", of shape {tuple(param.shape)},"


def state_fault(
    param: Tensor,
    state: Any,
    device: torch.device | None = None,
    stored: torch.dtype | None = None,
) -> str | None:
    """Returns why a tensor cannot be a parameter's state, as the end of a message; or None.

    Args:
        param: the parameter; one that is not initialized yet may have any shape.
        state: the tensor to check.
        device: the device on which it must be; None if it will be moved there.
        stored: a dtype that it may have beside floating ones.
    """
    if not isinstance(state, Tensor):
        return f"is of type {type(state).__name__}; a tensor is needed"
    if placements(state) != placements(param):
        return "is laid out over ranks in another way than the parameter"
    if state.layout != torch.strided:
        return f"is {state.layout}; a dense tensor is needed"
    if not is_lazy(param) and state.shape != param.shape:
        return f"has shape {tuple(state.shape)}"
    if not state.is_floating_point() and state.dtype != stored:
        return f"is {state.dtype}; a real floating-point tensor is needed"
    if device is not None and state.device != device:
        return f"is on {state.device}, not on {device}"
    if device is None and state.is_meta and not param.is_meta:
        return "has no values (it is on meta)"
    if not state.is_contiguous() and shares_memory(state):
        return "has elements that share memory (expand)"
    return None


def grad_fault(param: Tensor, grad: Tensor) -> str | None:
    """Returns why a gradient cannot be the parameter's, as the end of a message; or None."""
    if placements(param) != placements(grad):
        return (
            "is a plain tensor and the parameter a DTensor, or the reverse; both must be the same"
        )
    if grad.layout != torch.strided:
        return f"is {grad.layout}; a dense gradient is needed (sparse=False in the embedding?)"
    if not grad.is_floating_point():
        return f"is {grad.dtype}; a real floating-point gradient is needed"
    if grad.shape != param.shape:
        return f"has shape {tuple(grad.shape)}"
    if grad.device != param.device:
        return f"is on {grad.device}, not on {param.device}"
    return None


def check_finite(label: str, grads: Sequence[Tensor]) -> None:
    """Raises RuntimeError if one of these gradients holds NaN or inf; it waits for the device."""
    finite: list[Any] = [grad.isfinite().all() for grad in grads]
    # The result of a DTensor is reduced over ranks, so that all of them step or none does.
    bad = [not bool(f if placements(f) is None else f.full_tensor()) for f in finite]
    if any(bad):
        shapes = [tuple(g.shape) for g, is_bad in zip(grads, bad, strict=True) if is_bad]
        raise RuntimeError(
            f"{label}: NaN or inf in the gradients of {len(shapes)} "
            f"parameters, the first of shape {shapes[0]}. No parameter was changed."
        )
