"""Rules that convert AdamW's state to another optimizer's, and back; a part of its description.

AdamW's averages begin at 0, so after t steps they are too small by the factor ``1 - beta**t``, for
which its update corrects.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["FromAdam", "FromAverage"]


@dataclass(frozen=True)
class FromAverage:
    """A rule that converts one of AdamW's averages to a state, and back.

    Attributes:
        average: ``exp_avg`` or ``exp_avg_sq``.
        make: returns the state's values from the average's values in float32 and from
            ``1 - beta**t``; it may overwrite its argument.  For an average with the state's name it
            returns the same values if ``1 - beta**t`` is 1.
        undo: the same in the other direction.
        formulas: both conversions as text, where ``{}`` stands for ``1 - beta**t``.
    """

    average: str
    make: Callable[[Tensor, float], Tensor]
    undo: Callable[[Tensor, float], Tensor]
    formulas: tuple[str, str]


@dataclass(frozen=True)
class FromAdam:
    """The rules by which an optimizer continues a run of AdamW's, and AdamW continues one of its.

    lr * weight_decay stays the same.

    Attributes:
        states: the rules by the optimizer's states; each of AdamW's averages is in one.
        lr_factor: the ratio of its learning rate to AdamW's, on the way from AdamW.
        lr_factor_back: the same ratio on the way to AdamW.
    """

    states: Mapping[str, FromAverage]
    lr_factor: float
    lr_factor_back: float
