"""Settings of ``config_overrides`` for single parameters, translated for Megatron."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.core.optimizer import ParamKey, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from megatron_s3.mcore.all_ranks import gathered, raise_first
from megatron_s3.mcore.arguments.names import destination, flag_named
from megatron_s3.mcore.arguments.rules import OVERRIDES, rules
from megatron_s3.mcore.refusal import AllRanksError
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer
from megatron_s3.optimizers.description import Description, Hyperparameter
from megatron_s3.optimizers.stamp import PATTERN

__all__ = [
    "Rule",
    "algorithms",
    "check_owners",
    "described",
    "parts",
    "take_own",
    "translated",
    "with_rules",
]

#: Fields that Megatron allows in an override if they have the configuration's value.
_SAME_FOR_ALL = ("overlap_param_gather_with_optimizer_step", "optimizer_cpu_offload")

#: The keys of a group that Megatron's scheduler reads.
_SCHEDULED = tuple(sorted(set(ParamGroupOverride.__annotations__) - {*_SAME_FOR_ALL, "optimizer"}))


#: Ends of the names of a tied embedding: on the last pipeline stage, and on the first.
_OUTPUT, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


class Rule(ParamKey):  # type: ignore[misc]  # Megatron has no types
    """The ParamKey of a rule of ``--plugin-overrides``; its ``name`` is the pattern.

    The last pipeline stage's copy of a tied embedding is matched by the embedding's name, because
    both have to be stepped alike, and the copy exists with several stages only.
    """

    def matches(self, param: Tensor, param_name: str) -> bool:
        """Returns whether the pattern matches the name of a parameter."""
        if getattr(param, "shared_embedding", False) and param_name.endswith(_OUTPUT):
            param_name = param_name.removesuffix(_OUTPUT) + _EMBEDDING
        matched: bool = super().matches(param, param_name)
        return matched


def with_rules(overrides: Mapping[Any, Any] | None, config: Any) -> Mapping[Any, Any] | None:
    """Returns ``config_overrides`` and the rules of ``--plugin-overrides``, by ParamKey.

    Args:
        overrides: None means Megatron's standard ones, as in Megatron.
        config: Megatron's OptimizerConfig.

    Raises:
        ValueError: a rule does not have the form, or its pattern is a key of ``overrides`` too.
    """
    asked = _by_key(config)
    if not asked:
        return overrides
    if overrides is None:
        overrides = get_standard_config_overrides(config) or {}
    for key in asked:
        if (same := ParamKey(name=key.name)) in overrides:
            raise ValueError(
                f"{described(key)} and {described(same)} have the same pattern. Leave one out."
            )
    return {**overrides, **asked}


def _by_key(holder: Any) -> dict[Any, dict[str, Any]]:
    found = rules(getattr(holder, OVERRIDES, None))
    return {Rule(name=pattern): settings for pattern, settings in found.items()}


def translated(
    overrides: Mapping[Any, Mapping[str, Any]], cls: type[ElementwiseOptimizer], config: Any
) -> dict[Any, dict[str, Any]]:
    """Returns overrides from which Megatron's builder makes the requested param groups.

    An override may hold the keys that Megatron's scheduler reads (``max_lr``, ``min_lr``,
    ``start_wd``, ``end_wd``, ``wd_mult``), ``lr``, ``lr_mult``, ``weight_decay``, and the
    optimizer's own hyperparameters, as ``beta`` or as ``s3_beta``. ``lr`` and ``lr_mult`` become
    the limits of the scheduler's learning rate, in the configuration's proportion, and
    ``weight_decay`` becomes a constant decay; otherwise the scheduler would overwrite them.
    ``optimizer`` may name another optimizer of the plugin, whose hyperparameters the override may
    then hold; those it does not hold have that optimizer's defaults.

    Args:
        overrides: settings by ParamKey.
        cls: the optimizer of the groups for which no override names another.
        config: Megatron's OptimizerConfig.

    Returns:
        The overrides by the same keys; own hyperparameters are under their flag's destination
        (:func:`take_own`).  ``algorithm`` is the name of another optimizer.  ``pattern`` is in
        overrides whose parameters have states of another meaning than the rest.

    Raises:
        ValueError: a name is unknown, or a value is not allowed.
    """
    return {key: _translated(key, override, cls, config) for key, override in overrides.items()}


def _translated(
    key: Any, override: Mapping[str, Any], cls: type[ElementwiseOptimizer], config: Any
) -> dict[str, Any]:
    description = _description(key, override, cls)
    own: dict[str, Hyperparameter] = {}
    for h in description.hyperparameters:
        own |= {h.name: h, destination(description, h): h}
    result: dict[str, Any] = {}
    if description.name != cls.description.name:
        result["algorithm"] = description.name
    for name, value in override.items():
        called = f"{described(key)} sets {name}={value!r}"
        if name == "optimizer":
            continue
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
    if "algorithm" in result or _fixed_elsewise(description, result, config):
        result[PATTERN] = _pattern(key)
    if "lr" in result or "lr_mult" in result:
        _set_rates(key, result, config)
    if "weight_decay" in result:
        for name in ("start_wd", "end_wd"):
            result.setdefault(name, result["weight_decay"])
    return result


def _description(
    key: Any, override: Mapping[str, Any], cls: type[ElementwiseOptimizer]
) -> Description:
    """Returns the description of the optimizer of an override's parameters."""
    name = override.get("optimizer", cls.description.name)
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise ValueError(
            f"{described(key)} sets optimizer={name!r}, which is no optimizer of the plugin. For "
            f"single parameters it has {', '.join(OPTIMIZERS)}."
        )
    found: Description = OPTIMIZERS[name].description
    return found


def _fixed_elsewise(description: Description, values: Mapping[str, Any], config: Any) -> bool:
    """Returns whether an override's states mean something else than those of other parameters."""
    fixing = (destination(description, h) for h in description.hyperparameters if h.fixes_state)
    return any(name in values and values[name] != getattr(config, name, None) for name in fixing)


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
    """Returns a param group in which the hyperparameters of its algorithm have their own names.

    Args:
        group: the group.
        cls: the optimizer of groups without an ``algorithm``.
    """
    description = OPTIMIZERS[group.get("algorithm", cls.description.name)].description
    names = {destination(description, h): h.name for h in description.hyperparameters}
    return {names.get(name, name): value for name, value in group.items()}


def algorithms(
    overrides: Mapping[Any, Mapping[str, Any]], cls: type[ElementwiseOptimizer]
) -> list[type[ElementwiseOptimizer]]:
    """Returns the optimizer and all others that :func:`translated` overrides name."""
    names = [values["algorithm"] for values in overrides.values() if "algorithm" in values]
    return [cls, *(OPTIMIZERS[name] for name in dict.fromkeys(names))]


def parts(holder: Any) -> list[dict[str, Any]]:
    """Returns what a checkpoint knows the parameters of the rules of a run by.

    Args:
        holder: Megatron's arguments or OptimizerConfig, this run's or a saved one's.

    Raises:
        ValueError: a rule is not valid.
    """
    cls = OPTIMIZERS[holder.optimizer]
    given = _by_key(holder)
    own = {"algorithm": cls.description.name}
    return [own | each for each in translated(given, cls, holder).values() if PATTERN in each]


def check_owners(
    overrides: Mapping[Any, Mapping[str, Any]],
    named: Iterable[tuple[str, Tensor]],
    cls: type[ElementwiseOptimizer],
) -> None:
    """Raises AllRanksError if parameters have no definite optimizer or hyperparameters.

    Collective over all ranks.

    Args:
        overrides: :func:`translated` overrides.
        named: the trainable parameters of this rank by name.
        cls: the optimizer of parameters for which no override names another.
    """
    tied: list[tuple[str, dict[str, Any]]] = []
    raise_first(_contested(overrides, named, cls, tied))
    everywhere = [each for found in gathered(tied) for each in found]
    for name, settings in everywhere:
        first, its_settings = everywhere[0]
        if settings != its_settings:
            raise AllRanksError(
                f"the overrides give {first} and {name} different settings: "
                f"{its_settings or 'none'} and {settings or 'none'}. They are one tied embedding "
                "on two pipeline stages, which must be stepped alike. Make a pattern match both, "
                "or neither."
            )


def _contested(
    overrides: Mapping[Any, Mapping[str, Any]],
    named: Iterable[tuple[str, Tensor]],
    cls: type[ElementwiseOptimizer],
    tied: list[tuple[str, dict[str, Any]]],
) -> str | None:
    """Returns why a parameter has no definite settings, and adds tied embeddings to ``tied``."""
    for name, param in named:
        found = [(key, values) for key, values in overrides.items() if key.matches(param, name)]
        if getattr(param, "shared_embedding", False):
            tied.append((name, _merged(found)))
        if fault := _contradiction(name, found):
            return fault
        merged = _merged(found)
        description = OPTIMIZERS[merged.get("algorithm", cls.description.name)].description
        own = {destination(description, h) for h in description.hyperparameters}
        for key, values in found:
            if others := sorted(values.keys() & _hyperparameters() - own):
                return (
                    f"{described(key)} sets {', '.join(others)} for {name}, which another override "
                    f"gives to {description.label}. Exclude it from one of the patterns."
                )
    return None


def _merged(found: Iterable[tuple[Any, Mapping[str, Any]]]) -> dict[str, Any]:
    return {setting: value for _, values in found for setting, value in values.items()}


def _contradiction(name: str, found: Sequence[tuple[Any, Mapping[str, Any]]]) -> str | None:
    """Returns how two overrides of one parameter contradict each other; None if they do not."""
    first: dict[str, tuple[Any, Any]] = {}
    for key, values in found:
        for setting, value in values.items():
            before, other = first.setdefault(setting, (key, value))
            if other != value:
                shown = "optimizer" if setting in ("algorithm", PATTERN) else setting
                return (
                    f"{described(before)} and {described(key)} both match {name}, and both set "
                    f"{shown}. Exclude it from one of the patterns."
                )
    return None


def _hyperparameters() -> set[str]:
    """Returns the destinations of the hyperparameters of all optimizers."""
    descriptions = [cls.description for cls in OPTIMIZERS.values()]
    return {destination(d, h) for d in descriptions for h in d.hyperparameters}


def _pattern(key: Any) -> str:
    """Returns the text by which a checkpoint knows the parameters of an override."""
    names_alone = isinstance(key, Rule) or key == ParamKey(name=key.name)
    return str(key.name) if names_alone and isinstance(key.name, str) else described(key)


def described(key: Any) -> str:
    """Returns the name of an override in messages, from its ParamKey."""
    if isinstance(key, Rule):
        return f"{flag_named(OVERRIDES)} {key.name!r}"
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
