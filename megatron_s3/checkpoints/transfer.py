"""Conversion of AdamW's state to that of another optimizer, and back.

AdamW's averages begin at 0, and after t steps are too small by ``1 - beta**t``, which its update
makes up for.  An optimizer whose update does not is handed the state without that bias, and hands
it back with the bias, as its description says (:mod:`megatron_s3.optimizers.from_adam`).
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

#: Megatron's own AdamW, by the name that its flag has; the plugin's has the same state.
ADAM = "adam"

_MAIN = ("param", "fp32_param", "master_param")


def convertible() -> dict[str, Description]:
    """Returns the optimizers that AdamW's state can be converted to, and back from, by name."""
    return {n: cls.description for n, cls in OPTIMIZERS.items() if cls.description.from_adam}


def _place() -> re.Pattern[str]:
    """Returns the state's place in the names of a ``torch_dist`` checkpoint.

    ``optimizer.state.exp_avg.WEIGHT`` where it can be resharded,
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
    """Describes what becomes of one state.

    Attributes:
        name: of the state under the target.
        convert: returns its values there, of those in float32 and the correction.
        correction: ``1 - beta**t`` of AdamW's average; 1 before the first update.
        rule: the conversion as a formula, and with its number.
    """

    name: str
    convert: Callable[[Tensor, float], Tensor]
    correction: float
    rule: str


@dataclass(frozen=True)
class Settings:
    """One conversion.

    Attributes:
        description: of the optimizer that AdamW's state is converted to, or back from.
        back: whether it is converted back.
        step: updates that the state has seen.
        betas: AdamW's coefficients of ``exp_avg`` and ``exp_avg_sq``.
        eps: AdamW's.
        lr_factor: the optimizer's learning rates over AdamW's; weight decays are AdamW's over its.
        hyperparameters: the optimizer's.
        sharded: whether by the distributed optimizer.
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
        """Returns how the optimizer that saved it and the target are called."""
        both = short(AdamW.description), short(self.description)
        return both[::-1] if self.back else both

    @cached_property
    def states(self) -> dict[str, Change]:
        """Returns what becomes of each state, by the name that it has."""
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
        """Returns the conversion of every state, in words."""
        return ", ".join(change.rule for change in self.states.values())


def from_adam_of(description: Description) -> FromAdam:
    """Returns how the state is made of AdamW's, of an optimizer of :func:`convertible`."""
    assert description.from_adam is not None
    return description.from_adam


def short(description: Description) -> str:
    """Returns what messages call an optimizer."""
    return description.label.partition(" (")[0]


def state_of(name: str) -> str | None:
    """Returns which state a checkpoint's tensor is (``exp_avg``, ..., or ``param``), or None."""
    found = _PLACE.match(name)
    return found and found[2]


def rename(name: str, settings: Settings) -> str:
    """Returns the tensor's name under the target optimizer."""
    state = state_of(name)
    change = settings.states.get(state or "")
    if change is None or change.name == state:
        return name
    return _PLACE.sub(lambda m: m[1] + change.name, name)


def changes(name: str, settings: Settings) -> bool:
    """Returns whether the tensor's values differ afterwards."""
    state = state_of(name)
    change = settings.states.get(state or "")
    return change is not None and (change.name != state or change.correction != 1)


def convert_tensor(name: str, tensor: Tensor, settings: Settings) -> Tensor:
    """Returns a state's values under the target, in their dtype; it may overwrite ``tensor``."""
    change = settings.states[state_of(name) or ""]
    values = tensor.detach().to(torch.float32)
    return change.convert(values, change.correction).to(tensor.dtype)
