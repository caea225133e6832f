"""Check that the optimizers that Megatron builds step every parameter exactly once."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor

from megatron_s3.log import say
from megatron_s3.mcore.all_ranks import gathered, raise_first
from megatron_s3.mcore.arguments.readers import in_megatron_fsdp
from megatron_s3.mcore.overrides import described
from megatron_s3.mcore.refusal import AllRanksError

__all__ = ["Part", "build_part", "check", "collected", "model_groups", "parts_of", "trainable"]


@dataclass(frozen=True)
class Part:
    """An optimizer that Megatron built from param groups.

    Attributes:
        optimizer: the optimizer.
        groups: the model's parameters of each group; the optimizer may have replaced them by main
            parameters or shards since then.
        settings: the other values of each group; None if this rank does not know them.
    """

    optimizer: MegatronOptimizer
    groups: list[list[Tensor]]
    settings: list[dict[str, Any] | None]


_building: ContextVar[list[Part] | None] = ContextVar("building", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[Part]]:
    """Yields a list that collects all parts that are built inside the ``with``."""
    parts: list[Part] = []
    outer = _building.get()
    token = _building.set(parts)
    try:
        yield parts
    finally:
        _building.reset(token)
        if outer is not None:
            outer.extend(parts)


def build_part(
    original: Callable[..., Any],
    config: Any,
    model_chunks: Any,
    param_groups: list[dict[str, Any]],
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Wraps the construction of one optimizer from param groups, and records it."""
    groups = [list(group["params"]) for group in param_groups]
    settings = [_settings(group) for group in param_groups]
    built = original(config, model_chunks, param_groups, *rest, **kwargs)
    parts = _building.get()
    if parts is not None and isinstance(built, MegatronOptimizer):
        parts.append(Part(built, groups, settings))
    return built


def _settings(group: Mapping[str, Any]) -> dict[str, Any] | None:
    return {name: value for name, value in group.items() if name != "params"}


def parts_of(built: MegatronOptimizer) -> list[Part]:
    """Returns the parts of what was built where :func:`build_part` could not take note of them.

    That is where Megatron's functions are not wrapped.  A part then says itself which of the
    model's parameters it steps.
    """
    parts = []
    for part in getattr(built, "chained_optimizers", [built]):
        if part.optimizer is not None:
            settings = [_settings(group) for group in part.optimizer.param_groups]
            parts.append(Part(part, [*model_groups(part), _elsewhere(part)], [*settings, None]))
    return parts


def model_groups(part: MegatronOptimizer) -> list[list[Tensor]]:
    """Returns the model's parameters of each param group, of which this rank has elements."""
    if _is_sharded(part):
        kinds = (part.model_float16_groups, part.model_fp32_groups)
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        kinds = (part.float16_groups, part.fp32_from_fp32_groups)
    else:
        return [list(group["params"]) for group in part.optimizer.param_groups]
    return [[*halves, *wholes] for halves, wholes in zip(*kinds, strict=True)]


def _elsewhere(part: MegatronOptimizer) -> list[Tensor]:
    """Returns the model's parameters that other ranks step; they are in some group there."""
    if not _is_sharded(part):
        return []
    here = {id(param) for group in model_groups(part) for param in group}
    return [p for buffer in part.buffers for p in buffer.params if id(p) not in here]


def _is_sharded(part: MegatronOptimizer) -> bool:
    return isinstance(part, DistributedOptimizer) and not in_megatron_fsdp(part)


def check(
    parts: Sequence[Part],
    built: MegatronOptimizer,
    model_chunks: Sequence[torch.nn.Module],
    overrides: Mapping[Any, Mapping[str, Any]],
) -> None:
    """Compares the optimizers with the model and with the settings of single parameters.

    Collective over all ranks.

    Args:
        parts: all optimizers that were built.
        built: the optimizer that the caller gets.
        model_chunks: the model chunks of this rank.
        overrides: the ``config_overrides`` passed to Megatron's builder.

    Raises:
        AllRanksError: a trainable parameter is in no part or in two, a part is not stepped by the
            built optimizer, an override has no effect, or its name matches nothing on any rank.
    """
    named = trainable(model_chunks)
    raise_first(
        _uncounted(parts, named) or _unreached(parts, built) or _ignored(parts, named, overrides)
    )
    keys = [(part, described(key)) for key in overrides for part in _alternatives(key)]
    matched = [any(part.matches(p, name) for name, p in named) for part, _ in keys]
    for (part, called), *everywhere in zip(keys, *gathered(matched), strict=True):
        if any(everywhere):
            continue
        if part.attr or part.predicate or part.with_name_predicate:  # made for any model
            say(f"{called} matches no parameter, so it changes nothing")
        else:
            raise AllRanksError(
                f"{called}: no trainable parameter of the model has a name that matches "
                f"{part.name!r}. Correct the pattern (names are those of named_parameters()), or "
                "leave it out."
            )


def trainable(model_chunks: Sequence[torch.nn.Module]) -> list[tuple[str, Tensor]]:
    """Returns the trainable parameters of this rank by name."""
    return [
        (name, param)
        for chunk in model_chunks
        for name, param in chunk.named_parameters()
        if param.requires_grad
    ]


def _alternatives(key: Any) -> list[Any]:
    """Returns a key of names alone as one for each name, and any other as it is."""
    names = (key.name,) if isinstance(key.name, str) else key.name
    others = key.attr or key.predicate or key.with_name_predicate
    return [key] if others or not names else [replace(key, name=name) for name in names]


def _uncounted(parts: Sequence[Part], named: Sequence[tuple[str, Tensor]]) -> str | None:
    count = Counter(
        id(param)
        for part in parts
        if part.optimizer.optimizer is not None
        for group in part.groups
        for param in group
    )
    for number, what in ((0, "no optimizer was built for"), (2, "several optimizers step")):
        names = [name for name, param in named if min(count[id(param)], 2) == number]
        if names:
            return (
                f"{what} {len(names)} of {len(named)} trainable parameters, the first {names[0]}; "
                "each must be stepped by one optimizer. Freeze it (requires_grad=False), or "
                "build the optimizer of a model whose parameters Megatron knows individually."
            )
    return None


def _unreached(parts: Sequence[Part], built: MegatronOptimizer) -> str | None:
    reached = Counter(id(group) for group in built.param_groups)
    for part in parts:
        if any(reached[id(group)] != 1 for group in part.optimizer.param_groups):
            return (
                f"a {type(part.optimizer).__name__} was built that the {type(built).__name__} "
                "around it does not step exactly once. Build the optimizer with Megatron's own "
                "get_megatron_optimizer."
            )
    return None


def _ignored(
    parts: Sequence[Part],
    named: Sequence[tuple[str, Tensor]],
    overrides: Mapping[Any, Mapping[str, Any]],
) -> str | None:
    settings = {
        id(param): values
        for part in parts
        for group, values in zip(part.groups, part.settings, strict=True)
        for param in group
    }
    for key, override in overrides.items():
        for name, param in named:
            if not key.matches(param, name):
                continue
            known = settings[id(param)]
            for setting, value in override.items():
                if known is not None and known.get(setting) != value:
                    return (
                        f"{described(key)} sets {setting}={value!r}, but Megatron built the "
                        f"optimizer of {name} without it, because config_overrides do not reach "
                        "this type of model. Leave them out."
                    )
    return None
