"""A checkpoint's param groups, arguments and schedule, and their conversion."""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from megatron_s3.checkpoints.rates import with_rates
from megatron_s3.checkpoints.transfer import Settings
from megatron_s3.mcore.arguments.names import destination
from megatron_s3.optimizers.description import FORMAT

__all__ = ["arguments", "betas", "convert", "find", "steps"]

#: Keys in the groups that only AdamW has: torch's, Transformer Engine's or the plugin's.
_OF_ADAMS = {
    "amsgrad",
    "beta1",
    "beta2",
    "betas",
    "bias_correction",
    "capturable",
    "clip_update",
    "decoupled_weight_decay",
    "differentiable",
    "eps",
    "foreach",
    "fused",
    "maximize",
}
#: Keys that torch's AdamW needs in its groups to resume, in addition to betas and eps.
_TORCH_ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
    "bias_correction": True,  # Transformer Engine's
}


def convert(value: Any, settings: Settings) -> Any:
    """Returns a copy of a checkpoint's object with arguments, schedule and param groups converted.

    Other values are returned unchanged.
    """
    if isinstance(value, argparse.Namespace):
        return _convert_arguments(value, settings)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(convert(each, settings) for each in value)
    if type(value) is not dict:
        return value
    new: dict[str, Any] = {}
    for name, each in value.items():
        if name == "param_groups":
            new[name] = [_convert_group(group, settings) for group in each]
        elif name == "opt_param_scheduler" and isinstance(each, dict):
            new[name] = with_rates(each, settings.lr_factor, back=settings.back, schedule=True)
        elif name in ("rng_state", "rerun_state_machine"):
            new[name] = each
        else:
            new[name] = convert(each, settings)
    if "param_groups" in new:
        # Where the state is not sharded, Megatron keeps torch AdamW's step next to the groups.
        state = {k: v for k, v in new.get("state", {}).items() if k != "common_step"}
        if settings.back and not settings.sharded:
            state["common_step"] = torch.tensor(float(settings.step))
        new.pop("state", None)
        if state:
            new["state"] = state
    return new


def _convert_arguments(args: argparse.Namespace, settings: Settings) -> argparse.Namespace:
    values = with_rates(vars(args), settings.lr_factor, back=settings.back)
    values |= {"optimizer": settings.to, "clip_grad": settings.clip_grad}
    own = {
        destination(settings.description, h): settings.hyperparameters[h.name]
        for h in settings.description.hyperparameters
    }
    if settings.back:
        values |= {name: None for name in own if name in values}
    else:
        values |= own | {"s3_format": FORMAT}
    return argparse.Namespace(**values)


def _convert_group(group: dict[str, Any], settings: Settings) -> dict[str, Any]:
    description = settings.description
    dropped = _OF_ADAMS | {"algorithm", "format"} | {h.name for h in description.hyperparameters}
    values = {name: value for name, value in group.items() if name not in dropped}
    values = with_rates(values, settings.lr_factor, back=settings.back)
    values["step"] = settings.step
    if settings.back:
        return values | _TORCH_ADAMW | {"betas": settings.betas, "eps": settings.eps}
    stamp = {"algorithm": description.name, "format": FORMAT}
    return values | dict(settings.hyperparameters) | stamp


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """Yields every dict in an object, the outer ones first."""
    if isinstance(value, dict):
        yield value
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for each in value:
        yield from _dicts(each)


def find(value: Any) -> Iterator[dict[str, Any]]:
    """Yields every param group in an object of the checkpoint."""
    for each in _dicts(value):
        yield from each.get("param_groups", ())


def steps(value: Any) -> Iterator[int]:
    """Yields the step count of each param group in an object of the checkpoint."""
    for group in find(value):
        if group.get("step") is not None:
            yield int(float(group["step"]))
    for each in _dicts(value):
        if "common_step" in each:
            yield int(float(each["common_step"]))


def arguments(value: Any) -> Iterator[argparse.Namespace]:
    """Yields the arguments of the run in an object of the checkpoint, if it holds them."""
    if isinstance(value, dict) and isinstance(value.get("args"), argparse.Namespace):
        yield value["args"]
    elif isinstance(value, list | tuple):
        for each in value:
            yield from arguments(each)


def betas(group: dict[str, Any]) -> tuple[float, float] | None:
    """Returns the betas of AdamW in a param group, or None if it has none."""
    if "betas" in group:
        beta1, beta2 = group["betas"]
        return beta1, beta2
    return (group["beta1"], group["beta2"]) if "beta1" in group else None
