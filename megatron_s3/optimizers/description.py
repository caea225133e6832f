"""One description of an optimizer, from which everything that must know it is derived.

Flags and their validation, the names of the sharded state, the checkpoint's stamp and its checks
read this; none of them names an optimizer.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FORMAT", "KERNELS", "Description", "Hyperparameter"]

#: Of what the plugin's optimizers save: counted up when an older version would load it wrongly.
#: What was saved before there was a number is of format 1.
FORMAT = 1

#: The modules with fused kernels of the rules in :mod:`megatron_s3.kernels.forms`.
KERNELS = {"cpu": "megatron_s3.kernels.cpu", "cuda": "megatron_s3.kernels.gpu"}


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

    def check(self, value: Any, called: str | None = None) -> None:
        """Raises ValueError, naming the value as ``called``, if it is not allowed."""
        called = called or self.name
        if self.is_switch:
            if not isinstance(value, bool):
                raise ValueError(f"{called} must be True or False, not {value!r}")
            return
        if value is None and self.default is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{called} must be a number, not {value!r}")
        if not self.low <= value < self.high:  # also refuses NaN
            raise ValueError(f"{called} must be in [{self.low:g}, {self.high:g}), not {value!r}")


@dataclass(frozen=True)
class Description:
    """What an optimizer is, apart from its arithmetic.

    Attributes:
        name: value of ``--optimizer`` and of the stamp in checkpoints.
        label: how it is called in messages.
        state: names of the state tensors, in the order in which the rule takes them; each has the
            size of its parameter.
        hyperparameters: beside lr and weight decay.
        clip_grad: default of Megatron's ``--clip-grad`` under this optimizer.
        rule: the update rule, see :mod:`megatron_s3.rules`.
        bound: what theory allows an element's |u| at most, from the hyperparameters; None where it
            allows nothing or none is known.
        kernels: where to look for a fused kernel of the rule: device type -> name of a module,
            which is imported when it is needed (see :mod:`megatron_s3.kernels`); :data:`KERNELS`
            for the rules in :mod:`megatron_s3.kernels.forms`.
    """

    name: str
    label: str
    state: tuple[str, ...]
    hyperparameters: tuple[Hyperparameter, ...]
    clip_grad: float
    rule: Callable[..., Any]
    bound: Callable[..., float | None] = lambda **hyperparameters: None
    kernels: Mapping[str, str] = field(default_factory=dict)
