"""Settings of ``config_overrides`` for single parameters, translated for Megatron."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_s3.mcore.arguments import destination
from megatron_s3.optimizers import ElementwiseOptimizer
from megatron_s3.optimizers.description import Hyperparameter

__all__ = ["described", "take_own", "translated"]

#: Fields that Megatron allows in an override if they have the configuration's value.
_SAME_FOR_ALL = ("optimizer", "overlap_param_gather_with_optimizer_step", "optimizer_cpu_offload")

#: The keys of a group that Megatron's scheduler reads.
_SCHEDULED = tuple(sorted(set(ParamGroupOverride.__annotations__) - set(_SAME_FOR_ALL)))


def translated(
    overrides: Mapping[Any, Mapping[str, Any]], cls: type[ElementwiseOptimizer], config: Any
) -> dict[Any, dict[str, Any]]:
    """Returns overrides from which Megatron's builder makes the requested param groups.

    An override may hold the keys that Megatron's scheduler reads (``max_lr``, ``min_lr``,
    ``start_wd``, ``end_wd``, ``wd_mult``), ``lr``, ``lr_mult``, ``weight_decay``, and the
    optimizer's own hyperparameters, as ``beta`` or as ``s3_beta``. ``lr`` and ``lr_mult`` become
    the limits of the scheduler's learning rate, in the configuration's proportion, and
    ``weight_decay`` becomes a constant decay; otherwise the scheduler would overwrite them.
    ``optimizer`` is allowed if it is the configuration's.

    Args:
        overrides: settings by ParamKey.
        cls: the optimizer that will step the groups.
        config: Megatron's OptimizerConfig.

    Returns:
        The overrides by the same keys; own hyperparameters are under their flag's destination
        (:func:`take_own`).

    Raises:
        ValueError: a name is unknown, a value is not allowed, or another optimizer is named.
    """
    return {key: _translated(key, override, cls, config) for key, override in overrides.items()}


def _translated(
    key: Any, override: Mapping[str, Any], cls: type[ElementwiseOptimizer], config: Any
) -> dict[str, Any]:
    description = cls.description
    own: dict[str, Hyperparameter] = {}
    for h in description.hyperparameters:
        own |= {h.name: h, destination(description, h): h}
    result: dict[str, Any] = {}
    for name, value in override.items():
        called = f"{described(key)} sets {name}={value!r}"
        if name in _SAME_FOR_ALL:
            same = getattr(config, name, None)
            if value != same:
                raise ValueError(
                    f"{called}, and the configuration {name}={same!r}; this setting applies to "
                    f"all parameters. Leave {name} out of the override, or set it in the "
                    "configuration."
                )
        elif name in own:
            _check(own[name].check, value, called)
            at = destination(description, own[name])
            if result.get(at, value) != value:
                raise ValueError(
                    f"{called} and {own[name].name} to another value. Leave one of them out."
                )
            result[at] = value
        elif name in (*_SCHEDULED, "lr", "lr_mult", "weight_decay"):
            _check(_check_number, value, called)
            result[name] = value
        else:
            known = sorted({h.name for h in own.values()})
            raise ValueError(
                f"{called}, which is never read. For single parameters, {description.label} has "
                f"{', '.join(known)}, and Megatron has lr, lr_mult, weight_decay, "
                f"{', '.join(_SCHEDULED)}."
            )
    if "lr" in result or "lr_mult" in result:
        _set_rates(key, result, config)
    if "weight_decay" in result:
        for name in ("start_wd", "end_wd"):
            result.setdefault(name, result["weight_decay"])
    return result


def _set_rates(key: Any, result: dict[str, Any], config: Any) -> None:
    factor = result.pop("lr_mult", 1.0)
    lr = result.get("lr", result.get("max_lr", config.lr))
    if lr is None:
        raise ValueError(
            f"{described(key)} sets lr_mult={factor!r}, but the configuration has no lr to "
            "multiply. Set max_lr and min_lr in the override."
        )
    result["lr"] = lr * factor
    result["max_lr"] = result.get("max_lr", lr) * factor
    if "min_lr" in result:
        result["min_lr"] *= factor
    elif config.min_lr is not None:
        share = config.min_lr / config.lr if config.lr else 1.0
        result["min_lr"] = share * result["max_lr"]


def take_own(group: dict[str, Any], cls: type[ElementwiseOptimizer]) -> dict[str, Any]:
    """Returns a param group in which the optimizer's hyperparameters have their own names."""
    names = {destination(cls.description, h): h.name for h in cls.description.hyperparameters}
    return {names.get(name, name): value for name, value in group.items()}


def described(key: Any) -> str:
    """Returns the name of an override in messages, from its ParamKey."""
    parts = [f"{f.name}={getattr(key, f.name)!r}" for f in dataclasses.fields(key)]
    parts = [part for part in parts if not part.endswith("=()")]
    return f"config_overrides[{', '.join(parts)}]"


def _check(check: Any, value: Any, called: str) -> None:
    try:
        check(value)
    except ValueError as error:
        raise ValueError(f"{called}: {error}") from None


def _check_number(value: Any) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ValueError("it must be a finite number of at least 0")
