"""Conversion of AdamW's state to that of another optimizer, and back.

AdamW's averages begin at 0, so after t steps they are too small by the factor ``1 - beta**t``, for
which its update corrects.  For an optimizer without that correction the bias is removed from the
state, and it is restored on the way back, as the optimizer's description defines
(:mod:`megatron_s3.optimizers.from_adam`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_s3.optimizers import OPTIMIZERS, AdamW
from megatron_s3.optimizers.description import Description
from megatron_s3.optimizers.from_adam import FromAdam

__all__ = [
    "ADAM",
    "Change",
    "Settings",
    "changes",
    "convert_tensor",
    "convertible",
    "from_adam_of",
    "rename",
    "short",
    "state_of",
]

#: Megatron's AdamW, as ``--optimizer`` names it; the plugin's AdamW has the same state.
ADAM = "adam"

_MAIN = ("param", "fp32_param", "master_param")


def convertible() -> dict[str, Description]:
    """Returns the optimizers that AdamW's state can be converted to and from, by name."""
    return {n: cls.description for n, cls in OPTIMIZERS.items() if cls.description.from_adam}


def _place() -> re.Pattern[str]:
    """Returns the pattern of a state's name in a ``torch_dist`` checkpoint.

    The name is ``optimizer.state.exp_avg.WEIGHT`` where the checkpoint can be resharded, and
    ``optimizer.distributed....bucket_idx_0.exp_avg`` where it cannot.
    """
    states = {name for d in (AdamW.description, *convertible().values()) for name in d.state}
    names = "|".join(sorted({*_MAIN, *states}, reverse=True))
    return re.compile(
        rf"^((?:chained_\d+\.)?optimizer\.(?:state\.|.*\.bucket_idx_\d+\.))({names})(?=\.|$)"
    )


_PLACE = _place()


@dataclass(frozen=True)
class Change:
    """The conversion of one state.

    Attributes:
        name: the name of the state under the target optimizer.
        convert: returns the converted values, from the float32 values and the correction.
        correction: ``1 - beta**t`` of AdamW's average; 1 before the first update.
        rule: the conversion as a formula, with symbols and with numbers.
    """

    name: str
    convert: Callable[[Tensor, float], Tensor]
    correction: float
    rule: str


@dataclass(frozen=True)
class Settings:
    """The settings of a conversion.

    Attributes:
        description: describes the optimizer that AdamW's state is converted to, or back from.
        back: whether the state is converted back to AdamW's.
        step: the number of updates before the checkpoint.
        betas: AdamW's coefficients of ``exp_avg`` and ``exp_avg_sq``.
        eps: AdamW's epsilon.
        lr_factor: the ratio of the optimizer's learning rate to AdamW's, and of AdamW's weight
            decay to the optimizer's.
        hyperparameters: the optimizer's hyperparameters.
        sharded: whether the state is sharded by the distributed optimizer.
    """

    description: Description
    back: bool
    step: int
    betas: tuple[float, float]
    eps: float
    lr_factor: float
    hyperparameters: Mapping[str, Any]
    sharded: bool

    @property
    def to(self) -> str:
        """Returns the target, a value of ``--optimizer``."""
        return ADAM if self.back else self.description.name

    @property
    def clip_grad(self) -> float:
        """Returns the target's default of ``--clip-grad``."""
        return (AdamW.description if self.back else self.description).clip_grad

    @property
    def labels(self) -> tuple[str, str]:
        """Returns what messages call the optimizer that saved the state, and the target."""
        both = short(AdamW.description), short(self.description)
        return both[::-1] if self.back else both

    @cached_property
    def states(self) -> dict[str, Change]:
        """Returns the conversion of each state, by the name it has in the checkpoint."""
        changes = {}
        for own, state in from_adam_of(self.description).states.items():
            beta = self.betas[state.average != "exp_avg"]
            correction = 1 - beta**self.step if self.step else 1.0
            old, new = (own, state.average) if self.back else (state.average, own)
            formula = state.formulas[self.back]
            rule = f"{formula.format(f'(1 - {beta:g}^t)')} = {formula.format(f'{correction:.6g}')}"
            convert = state.undo if self.back else state.make
            rule = rule if new == old else f"{new} = {rule}"
            changes[old] = Change(new, convert, correction, rule)
        return changes

    @property
    def rule(self) -> str:
        """Returns the formulas of all states as text."""
        return ", ".join(change.rule for change in self.states.values())


def from_adam_of(description: Description) -> FromAdam:
    """Returns the rules of conversion of an optimizer of :func:`convertible`."""
    assert description.from_adam is not None
    return description.from_adam


def short(description: Description) -> str:
    """Returns the short name of an optimizer in messages."""
    return description.label.partition(" (")[0]


def state_of(name: str) -> str | None:
    """Returns the state that a tensor's name stands for (``exp_avg``, ``param``, ...), or None."""
    found = _PLACE.match(name)
    return found and found[2]


def rename(name: str, settings: Settings) -> str:
    """Returns the name of a tensor under the target optimizer."""
    state = state_of(name)
    change = settings.states.get(state or "")
    if change is None or change.name == state:
        return name
    return _PLACE.sub(lambda m: m[1] + change.name, name)


def changes(name: str, settings: Settings) -> bool:
    """Returns whether the conversion changes the tensor's values or name."""
    state = state_of(name)
    change = settings.states.get(state or "")
    return change is not None and (change.name != state or change.correction != 1)


def convert_tensor(name: str, tensor: Tensor, settings: Settings) -> Tensor:
    """Returns the converted values of a state in its dtype; it may overwrite ``tensor``."""
    change = settings.states[state_of(name) or ""]
    values = tensor.detach().to(torch.float32)
    return change.convert(values, change.correction).to(tensor.dtype)
