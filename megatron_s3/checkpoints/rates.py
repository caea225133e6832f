"""Scaling of learning rates and weight decays in decimal arithmetic."""

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

__all__ = ["others", "over", "scaled", "with_rates"]

#: Names of learning rates in arguments and param groups, and in a schedule.
_RATES = ("lr", "min_lr", "max_lr", "decoupled_lr", "decoupled_min_lr", "lr_warmup_init")
_SCHEDULER_RATES = ("max_lr", "start_lr", "min_lr", "init_lr")
_DECAYS = ("weight_decay", "start_weight_decay", "end_weight_decay", "start_wd", "end_wd")


def scaled(value: float, factor: float) -> float:
    """Returns the decimal ``value * factor``: 3e-4 * 10 is 3e-3, not 2.9999999999999996e-3.

    Megatron requires that the learning rates of a checkpoint equal those of the flags.
    """
    return _written(Decimal(repr(float(value))) * Decimal(repr(float(factor))))


def over(value: float, factor: float) -> float:
    """Returns the decimal ``value / factor``, as :func:`scaled` does."""
    return _written(Decimal(repr(float(value))) / Decimal(repr(float(factor))))


def _written(value: Decimal) -> float:
    """Returns the number with 14 digits if it differs only by rounding (1/3 times 3 is 1)."""
    exact, short = float(value), float(f"{value:.14g}")
    return short if math.isclose(exact, short, rel_tol=4e-16) else exact


def others(args: Mapping[str, Any]) -> list[str]:
    """Returns the arguments of a run that a factor changes, other than the three that all have."""
    known = {"lr", "min_lr", "weight_decay"}
    if args.get("weight_decay_incr_style", "constant") == "constant":
        known |= {"start_weight_decay", "end_weight_decay"}  # Megatron sets them itself
    return [name for name in (*_RATES, *_DECAYS) if args.get(name) and name not in known]


def with_rates(
    values: Mapping[str, Any], factor: float, *, back: bool, schedule: bool = False
) -> dict[str, Any]:
    """Returns the values with learning rates multiplied, and weight decays divided, by a factor.

    Args:
        values: arguments, a param group or the state of a schedule.
        factor: the factor.
        back: whether to divide the learning rates and multiply the weight decays instead.
        schedule: whether the values are a schedule's, whose names differ.
    """
    change: tuple[Callable[[float, float], float], ...] = (over, scaled) if back else (scaled, over)
    rates = _SCHEDULER_RATES if schedule else _RATES
    new = dict(values)
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            if name in rates:
                new[name] = change[0](value, factor)
            elif name in _DECAYS:
                new[name] = change[1](value, factor)
    return new
