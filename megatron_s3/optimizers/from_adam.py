"""Rules that make an optimizer's state of AdamW's, and back; part of its description.

AdamW's averages begin at 0, and after t steps are too small by ``1 - beta**t``, which its update
makes up for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["FromAdam", "FromAverage"]


@dataclass(frozen=True)
class FromAverage:
    """A rule that makes one state of one of AdamW's averages, and back.

    Attributes:
        average: ``exp_avg`` or ``exp_avg_sq``.
        make: returns the state's values from the average's, in float32, and from ``1 - beta**t``;
            it may overwrite what it gets.  Of an average of the state's own name it returns the
            same values where that is 1.
        undo: the way back, as ``make``.
        formulas: both for people; ``{}`` stands for ``1 - beta**t``.
    """

    average: str
    make: Callable[[Tensor, float], Tensor]
    undo: Callable[[Tensor, float], Tensor]
    formulas: tuple[str, str]


@dataclass(frozen=True)
class FromAdam:
    """The rules by which an optimizer goes on from a run of AdamW's, and AdamW from its.

    lr * weight_decay stays as it was.

    Attributes:
        states: by the optimizer's own names; each of AdamW's averages is in one.
        lr_factor: its learning rate over AdamW's, on the way from AdamW.
        lr_factor_back: the same on the way to AdamW.
    """

    states: Mapping[str, FromAverage]
    lr_factor: float
    lr_factor_back: float
