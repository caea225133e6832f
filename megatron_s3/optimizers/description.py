"""One description of an optimizer, from which everything that must know it is derived.

Flags and their validation, the names of the sharded state, the checkpoint's stamp and its checks
read this; none of them names an optimizer.
"""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_s3.optimizers.from_adam import FromAdam

__all__ = [
    "FORMAT",
    "FORMAT_WITH_STEPS",
    "LARGEST",
    "Description",
    "Hyperparameter",
    "plain",
]

#: Of what the plugin's optimizers save: counted up when an older version would load it wrongly.
#: What was saved before there was a number is of format 1.
FORMAT = 1

#: Of what is saved where the parameters of a group differ in their number of updates.
FORMAT_WITH_STEPS = 2

#: The largest number that the arithmetic of a step can hold: float32's, but for float64 parameters.
LARGEST = (2 - 2**-23) * 2.0**127


def plain(value: Any) -> Any:
    """Returns a number or a switch as Python's own; what is neither comes back as it is.

    Args:
        value: a Python number, a fraction, a NumPy scalar or 0-dim array.  A number too large for
            a float becomes inf.  A 0-dim tensor is read in the CPU's memory alone.
    """
    number = value
    if isinstance(value, Tensor):
        number = (
            value.item()
            if type(value) is Tensor and not value.dim() and value.device.type == "cpu"
            else value
        )
    elif getattr(value, "ndim", None) == 0:
        number = value.item()
    if isinstance(number, bool):
        return number
    if not isinstance(number, numbers.Real):
        return value
    try:
        converted = float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf  # type: ignore[operator]
    return number if isinstance(number, int) else converted


@dataclass(frozen=True)
class Hyperparameter:
    """A number or switch of an optimizer, beside lr and weight decay.

    Attributes:
        name: key in the param groups, keyword of the constructor; ``--<optimizer>-<name>`` in
            Megatron (a switch that is on by default: ``--<optimizer>-no-<name>``).
        default: its value where nothing is given.  A bool makes it a switch; None makes it an
            optional number.
        help: one line for ``--help``.
        low: smallest value allowed.
        high: smallest value above ``low`` that is not allowed.
        fixes_state: the stored state has a meaning only with the value it was made with, so that a
            checkpoint of another value is refused.
    """

    name: str
    default: float | bool | None
    help: str
    low: float = -math.inf
    high: float = math.inf
    fixes_state: bool = False

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return isinstance(self.default, bool)

    def check(self, value: Any, called: str | None = None, largest: float = LARGEST) -> Any:
        """Returns the value as :func:`plain` gives it.

        Args:
            value: what is asked for.
            called: how a message names it; its name, if None.
            largest: what the arithmetic can hold.

        Raises:
            ValueError: the value is not allowed.
        """
        called = called or self.name
        number = plain(value)
        if self.is_switch:
            if not isinstance(number, bool):
                raise ValueError(f"{called} must be True or False, not {value!r}")
            return number
        if number is None and self.default is None:
            return number
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{called} must be a number, not {value!r}")
        if not self.low <= number < self.high:  # also refuses NaN
            raise ValueError(f"{called} must be in [{self.low:g}, {self.high:g}), not {value!r}")
        if abs(number) > largest:
            raise ValueError(
                f"{called} must be at most {largest:.8g}, the largest float32, not {value!r}"
            )
        return number


@dataclass(frozen=True)
class Description:
    """The facts about an optimizer, apart from its arithmetic.

    Attributes:
        name: value of ``--optimizer`` and of the stamp in checkpoints.
        label: how it is called in messages.
        state: names of the state tensors, in the order in which the rule takes them; each has the
            size of its parameter.
        clip_grad: default of Megatron's ``--clip-grad`` under this optimizer.
        rule: the update rule, see :mod:`megatron_s3.rules`.
        hyperparameters: beside lr and weight decay; made from the constructor of a class that has
            one of :func:`megatron_s3.optimizers.arguments.arguments`.
        bound: what theory allows an element's |u| at most, from the hyperparameters; None where it
            allows nothing or none is known.
        momentum: the hyperparameter that torch's schedulers (OneCycleLR, CyclicLR) set as the
            momentum, where none has that name: the coefficient of the gradient's average.
        from_adam: how ``megatron-s3 convert`` makes its state of AdamW's, and back; None where
            nothing of one continues the other.
    """

    name: str
    label: str
    state: tuple[str, ...]
    clip_grad: float
    rule: Callable[..., Any]
    hyperparameters: tuple[Hyperparameter, ...] = ()
    bound: Callable[..., float | None] = lambda **hyperparameters: None
    momentum: str | None = None
    from_adam: FromAdam | None = None
