"""Learning rates and weight decays times a factor, as it is done on paper."""

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

__all__ = ["over", "scaled", "with_rates"]

#: Of a run's arguments and param groups, and of its schedule.
_RATES = ("lr", "min_lr", "max_lr", "decoupled_lr", "decoupled_min_lr", "lr_warmup_init")
_SCHEDULER_RATES = ("max_lr", "start_lr", "min_lr", "init_lr")
_DECAYS = ("weight_decay", "start_weight_decay", "end_weight_decay", "start_wd", "end_wd")


def scaled(value: float, factor: float) -> float:
    """Returns ``value * factor`` as on paper: 3e-4 * 10 is 3e-3, and not 2.9999999999999996e-3.

    Megatron compares the rates of a checkpoint with those of the flags exactly.
    """
    return _written(Decimal(repr(float(value))) * Decimal(repr(float(factor))))


def over(value: float, factor: float) -> float:
    """Returns ``value / factor``, as :func:`scaled`."""
    return _written(Decimal(repr(float(value))) / Decimal(repr(float(factor))))


def _written(value: Decimal) -> float:
    """Returns a short number, if it is one but for a rounding: a third, times 3."""
    exact, short = float(value), float(f"{value:.14g}")
    return short if math.isclose(exact, short, rel_tol=4e-16) else exact


def with_rates(
    values: Mapping[str, Any], factor: float, *, back: bool, schedule: bool = False
) -> dict[str, Any]:
    """Returns values with the rates times the factor and the weight decays over it, or ``back``.

    Args:
        values: arguments or a param group, or a schedule's.
        factor: of the learning rates.
        back: rates are divided and decays multiplied instead.
        schedule: whether they are a schedule's, which has other names.
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
