"""Description of an optimizer, from which the rest of the package is derived.

Flags and their validation, the names of the sharded state, and the optimizer metadata in
checkpoints and its checks read the description; none of them names an optimizer.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_s3.optimizers.from_adam import FromAdam

__all__ = [
    "FORMAT",
    "FORMAT_WITH_STEPS",
    "LARGEST",
    "RESERVED",
    "Description",
    "Hyperparameter",
    "plain",
]

#: The format of a saved state; it is increased when an older version would load the state wrongly.
#: A state without a number has format 1.
FORMAT = 1

#: The format of a state in which the parameters of a group differ in their number of updates.
FORMAT_WITH_STEPS = 2

#: The largest number that a step can represent: float32's, except for float64 parameters.
LARGEST = (2 - 2**-23) * 2.0**127

#: The keys of a param group that do not depend on its algorithm; no hyperparameter has them.
RESERVED = (
    *("params", "param_names", "lr", "weight_decay", "algorithm", "format", "step"),
    *("steps", "fractions", "pattern", "betas"),
)


def plain(value: Any) -> Any:
    """Returns a number or a switch as a Python object, and any other value unchanged.

    Args:
        value: a Python number, a fraction, a NumPy scalar or 0-dim array.  A number too large for
            a float becomes inf.  A 0-dim tensor is read only if it is on the CPU.
    """
    number = value
    if isinstance(value, Tensor):
        if type(value) is Tensor and not value.dim() and value.device.type == "cpu":
            number = value.item()
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
    """A number or switch of an optimizer, in addition to lr and weight decay.

    Attributes:
        name: the key in the param groups and the keyword of the constructor; the flag is
            ``--<optimizer>-<name>`` (``--<optimizer>-no-<name>`` for a switch that is on by
            default).
        default: the default value.  If it is a bool, this is a switch; if it is None, an optional
            number.
        help: one line for ``--help``.
        low: the smallest value allowed.
        high: the smallest value above ``low`` that is not allowed.
        fixes_state: whether a stored state can only be used with the value it was computed with, so
            that a checkpoint with another value is rejected.
    """

    name: str
    default: float | bool | None
    help: str
    low: float = -math.inf
    high: float = math.inf
    fixes_state: bool = False

    @property
    def is_switch(self) -> bool:
        """Whether it is a switch: on or off."""
        return isinstance(self.default, bool)

    def check(self, value: Any, called: str | None = None, largest: float = LARGEST) -> Any:
        """Returns the value as :func:`plain` gives it.

        Args:
            value: the value to check.
            called: its name in messages; :attr:`name` if None.
            largest: the largest number that the arithmetic can represent.

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
        if not self.low <= number < self.high:  # False for NaN, too
            raise ValueError(f"{called} must be in [{self.low:g}, {self.high:g}), not {value!r}")
        if abs(number) > largest:
            raise ValueError(
                f"{called} must be at most {largest:.8g}, the largest float32, not {value!r}"
            )
        return number


@dataclass(frozen=True)
class Description:
    """The facts about an optimizer, except its arithmetic.

    Attributes:
        name: the value of ``--optimizer`` and of the optimizer metadata in checkpoints.
        label: the optimizer's name in messages.
        state: the names of the state tensors, in the order in which the rule takes them; each has
            the size of its parameter.
        clip_grad: the default of Megatron's ``--clip-grad`` for this optimizer.
        rule: the update rule, see :mod:`megatron_s3.rules`.
        hyperparameters: the hyperparameters other than lr and weight decay; they are taken from the
            class's constructor if :func:`megatron_s3.optimizers.arguments.arguments` made it.
        bound: returns the theoretical bound on an element's ``|u|`` from the hyperparameters, or
            None if there is none.
        momentum: the hyperparameter that torch's schedulers (OneCycleLR, CyclicLR) set as the
            momentum, if none has that name: the coefficient of the gradient's average.
        from_adam: the conversion of ``megatron-s3 convert`` from AdamW's state and back; None if
            the state cannot be converted.
        fractions: the states that may be stored in int8, as fractions of the state after them,
            which they never exceed in magnitude; with the name of the other.
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
    fractions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.state
        if isinstance(names, str) or len(set(names)) < len(names) or "master_param" in names:
            raise ValueError(
                f"{self.label}: state must be a tuple of different names, none of which is "
                f"master_param, not {names!r}"
            )
