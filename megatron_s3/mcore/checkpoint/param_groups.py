"""Param groups of a checkpoint, matched with those of this optimizer."""

import contextlib
import functools
import importlib.util
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer, optimizer

from megatron_s3.mcore.state import Scheduled, running
from megatron_s3.optimizers.stamp import PATTERN

__all__ = ["load_schedule", "load_state_dict", "pairs", "restore_scheduled"]

#: The keys from which a schedule sets a group's learning rate and weight decay; from 0.19 on
#: Megatron compares some of them.
_SCHEDULED = ("max_lr", "min_lr", "start_wd", "end_wd")

#: The keys by which Megatron finds the saved group.
_KNOWN_BY: tuple[str, ...] = optimizer.param_group_identifier_keys

#: The keys by which the plugin's groups differ, whatever their other values are.
_OWN = ("algorithm", PATTERN)

#: In both groups while a checkpoint is loaded, instead of the keys above.
_MARK = "megatron_s3_group"


def load_state_dict(original: Callable[..., Any], part: Any, saved: dict[str, Any]) -> Any:
    """Wraps ``load_state_dict`` of a Megatron optimizer; each group gets back its own values.

    Megatron finds the saved group by some of its values. It does not compare others that may differ
    between groups (``weight_decay``, ``eps``, before 0.19 the learning rates), so all groups that
    agree in the compared values would get the values of one. The values of a schedule do not
    identify a group: a run may resume with other learning rates, and then uses its own, except with
    ``--use-checkpoint-opt_param-scheduler`` (:func:`load_schedule` has the last word).
    """
    if part.optimizer is None:
        return original(part, saved)
    current = part.optimizer.param_groups
    scheduled = [{name: g[name] for name in _SCHEDULED if name in g} for g in current]
    result = _load(original, part, saved)
    loaded = [
        Scheduled(group, own, {name: group[name] for name in own if name in group})
        for group, own in zip(part.optimizer.param_groups, scheduled, strict=True)
    ]
    running().scheduled[part] = loaded
    from_checkpoint = _from_checkpoint(part)
    for each in loaded:
        each.apply(from_checkpoint)
    if from_checkpoint and _schedule(part) is not None:
        _keep_decays(part.optimizer)
    return result


def _keep_decays(inner: torch.optim.Optimizer) -> None:
    """Makes the next step use the weight decays that were loaded.

    Megatron's scheduler sets this run's when it is loaded, and the checkpoint's after the first
    step only.  :func:`load_schedule` sets them before, where the plugin is registered.
    """
    saved = [group["weight_decay"] for group in inner.param_groups]

    def restore(stepped: torch.optim.Optimizer, *rest: Any) -> None:
        for group, decay in zip(stepped.param_groups, saved, strict=False):  # none the next time
            group["weight_decay"] = decay
        saved.clear()

    inner.register_step_pre_hook(restore)


def load_schedule(original: Callable[..., Any], schedule: Any, saved: dict[str, Any]) -> Any:
    """Wraps ``load_state_dict`` of OptimizerParamScheduler; the first step has the right values.

    The groups get the rates of the checkpoint or of this run as the schedule says, which in a
    program without Megatron's trainer is not known before. Megatron sets the groups before it has
    loaded the weight decay, so the first step after ``--use-checkpoint-opt_param-scheduler`` would
    use this run's.
    """
    groups = {id(group) for group in schedule.optimizer.param_groups}
    for loaded in running().scheduled.values():
        for each in loaded:
            if id(each.group) in groups:
                each.apply(bool(schedule.use_checkpoint_opt_param_scheduler))
    result = original(schedule, saved)
    schedule.step(increment=0)
    return result


def _schedule(part: Any) -> Any:
    """Returns the configuration of the schedule that Megatron-Bridge's optimizer knows, or None."""
    return getattr(getattr(part, "config", None), "schedule", None)


def _from_checkpoint(part: Any) -> bool:
    """Returns whether the checkpoint's schedule is used, as far as that is known here.

    Megatron-Bridge's configuration of the optimizer may know it, and Megatron's trainer does.
    """
    schedule = _schedule(part)
    if schedule is not None:
        return bool(schedule.use_checkpoint_opt_param_scheduler)
    if importlib.util.find_spec("megatron.training") is None:
        return False
    from megatron.training import global_vars

    args = global_vars._GLOBAL_ARGS
    return bool(getattr(args, "use_checkpoint_opt_param_scheduler", False))


def restore_scheduled(part: Any, saved: list[dict[str, Any]]) -> None:
    """Restores learning rates as :func:`load_state_dict`, if Megatron loads no param groups."""
    if _from_checkpoint(part):
        current = part.optimizer.param_groups
        found = pairs(current, saved) or _known(current, saved)
        for group, place in zip(current, found, strict=True):
            group.update({n: saved[place][n] for n in _SCHEDULED if n in saved[place]})


def _known(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[int]:
    """Returns the places of current groups that are the only one of their kind."""
    places = {_values(group, _KNOWN_BY): place for place, group in enumerate(saved)}
    return [places[_values(group, _KNOWN_BY)] for group in current]


def _load(original: Callable[..., Any], part: Any, saved: dict[str, Any]) -> Any:
    name = next((k for k in ("optimizer", "optimizer_state_dict") if k in saved), None)
    holder = saved if name is None else saved[name]
    saved_groups = holder.get("param_groups", [])
    found = pairs(part.optimizer.param_groups, saved_groups)
    if found is None:
        return original(part, saved)
    marks = {place: mark for mark, place in enumerate(found)}
    groups = [group | {_MARK: marks.get(place)} for place, group in enumerate(saved_groups)]
    marked = holder | {"param_groups": groups}
    with _marked(part.optimizer):
        return original(part, marked if name is None else saved | {name: marked})


@contextlib.contextmanager
def _marked(inner: torch.optim.Optimizer) -> Iterator[None]:
    """Makes Megatron identify the groups by a mark, which is their number."""
    for mark, group in enumerate(inner.param_groups):
        group[_MARK] = mark
    for module in (optimizer, distrib_optimizer):
        module.param_group_identifier_keys = (_MARK,)
    try:
        yield
    finally:
        for module in (optimizer, distrib_optimizer):
            module.param_group_identifier_keys = _KNOWN_BY
        # If a part of the parameters is offloaded, Adam's optimizer consists of several.
        for each in (inner, *getattr(inner, "sub_optimizers", ())):
            for group in each.param_groups:
                group.pop(_MARK, None)


def pairs(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[int] | None:
    """Returns the place of each current group's counterpart among the saved groups.

    Groups that agree in the values that Megatron compares are matched by all other saved values
    that current and saved groups hold equally often. Groups with equal values are matched in order.

    Returns:
        None if Megatron's own comparison decides, or finds no counterpart, which Megatron reports.

    Raises:
        ValueError: groups that Megatron does not distinguish cannot be matched.
    """
    alike = functools.partial(_alike, current, saved)
    if all(len(own) == len(theirs) == 1 for own, theirs in alike(_KNOWN_BY)):
        return None
    known_by = (*_KNOWN_BY, *_OWN)
    needed = alike(known_by)
    if not all(theirs for _, theirs in needed):
        needed = alike([name for name in known_by if name not in _SCHEDULED])
    if not all(theirs for _, theirs in needed):
        return None
    found = [0] * len(current)
    for own, theirs in needed:
        if len(own) != len(theirs):
            raise ValueError(_ambiguous(current, own, saved, theirs))
        names = {name for i in own for name in current[i]} | {n for i in theirs for n in saved[i]}
        kept = [
            name
            for name in sorted(names - {"params"})
            if Counter(_values(current[i], (name,)) for i in own)
            == Counter(_values(saved[i], (name,)) for i in theirs)
        ]
        places = defaultdict(list)
        for place in theirs:
            places[_values(saved[place], kept)].append(place)
        for i in own:
            candidates = places[_values(current[i], kept)]
            if not candidates:
                raise ValueError(_ambiguous(current, own, saved, theirs))
            found[i] = candidates.pop(0)
        if not _in_proportion([(current[i], saved[found[i]]) for i in own]):
            raise ValueError(_ambiguous(current, own, saved, theirs))
    return found


def _alike(
    current: list[dict[str, Any]], saved: list[dict[str, Any]], names: Iterable[str]
) -> list[tuple[list[int], list[int]]]:
    """Returns places of current and of saved groups with equal values, by rising learning rates."""
    classes: dict[Any, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for which, groups in enumerate((current, saved)):
        for place in sorted(range(len(groups)), key=lambda i: _scheduled(groups[i])):
            classes[_values(groups[place], names)][which].append(place)
    return [(own, theirs) for own, theirs in classes.values() if own]


def _scheduled(group: dict[str, Any]) -> tuple[float, ...]:
    return tuple(float(group.get(name) or 0) for name in _SCHEDULED)


def _in_proportion(groups: list[tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    """Returns whether all highest learning rates were multiplied by the same number."""
    rates = [(_scheduled(now)[0], _scheduled(then)[0]) for now, then in groups]
    (now, then), *others = rates
    return all(math.isclose(now * b, a * then, rel_tol=1e-9) for a, b in others)


def _values(group: dict[str, Any], names: Any) -> tuple[Any, ...]:
    # NeMo calls lr_mult and wd_mult pre_lr_mult and pre_wd_mult.
    return tuple(_comparable(group.get(name, group.get(f"pre_{name}"))) for name in names)


def _comparable(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    return value if isinstance(value, Hashable) else repr(value)


def _ambiguous(
    current: list[dict[str, Any]], own: list[int], saved: list[dict[str, Any]], theirs: list[int]
) -> str:
    def differing(groups: list[dict[str, Any]]) -> str:
        names = sorted({name for group in groups for name in group} - {"params"})
        names = [n for n in names if len({_values(group, (n,)) for group in groups}) > 1]
        return "; ".join(
            " ".join(f"{n}={group.get(n)}" for n in names) or "all alike" for group in groups
        )

    return (
        f"the checkpoint has {len(theirs)} param groups ({differing([saved[i] for i in theirs])}) "
        f"for {len(own)} of this optimizer ({differing([current[i] for i in own])}), and they "
        "cannot be matched. Resume with the config_overrides of the saved run, or load the "
        "model's weights alone."
    )
