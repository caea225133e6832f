"""Checks of a configuration: its arithmetic, and Megatron's own parser and validation."""

import argparse
import contextlib
import difflib
import importlib.util
import os
import re
from typing import Any
from unittest import mock

from megatron_s3.launch.config import Config, ConfigError
from megatron_s3.log import tell

__all__ = [
    "arithmetic",
    "ask_megatron",
    "check",
    "environment",
    "iterations",
    "megatron_is_here",
    "refuse_missing_gpus",
    "schedule",
    "whole",
]


def megatron_is_here() -> bool:
    """Returns whether torch and a Megatron with a trainer can be imported."""
    try:
        return all(importlib.util.find_spec(name) for name in ("torch", "megatron.training"))
    except ModuleNotFoundError:
        return False


def ask_megatron(config: Config, more: list[str] | None = None) -> None:
    """Calls :func:`check`; without Megatron, logs that the job's nodes will make the checks."""
    if megatron_is_here():
        tell("checking the arguments with Megatron; the import takes a few seconds")
        check(config, more)
    else:
        print("Megatron is not installed here; the nodes of the job check the arguments")


def check(config: Config, more: list[str] | None = None) -> argparse.Namespace:
    """Checks that a configuration can run.

    Args:
        config: the configuration to check.
        more: Megatron arguments in addition to the configuration's own (the dataset's).

    Returns:
        Megatron's arguments, validated.

    Raises:
        ConfigError: naming file, line and reason.
        ImportError: Megatron is not installed; :func:`arithmetic` does not need it.
    """
    words = [*config.words(), *(more or [])]
    arithmetic(config)
    schedule(config)
    _own_values(config)
    with environment(config):
        return _check(config, words)


def environment(config: Config) -> contextlib.AbstractContextManager[object]:
    """Sets the environment of the ranks in this process, inside a ``with``."""
    return mock.patch.dict(os.environ, config.launch.environment)


def _check(config: Config, words: list[str]) -> argparse.Namespace:
    from megatron_s3.mcore import gpt
    from megatron_s3.mcore.planning import parse
    from megatron_s3.mcore.refusal import Refused

    parse.prepare(words)
    _names_and_values(config, parse.parser())
    try:
        args = parse.parse(words, config.world_size)
        if not config.launch.script:
            gpt.refuse_other_models(args)
        return args
    except ValueError as error:
        named = [
            f"{name} ({config.where(name)})"
            for name in config.arguments
            if re.search(rf"(?<![\w-])(--)?{name.replace('_', '[-_ ]')}(?![\w-])", str(error))
        ]
        named += [
            f"{name}={value} ({config.where(f'launch.environment.{name}')})"
            for name, value in config.launch.environment.items()
            if name in str(error)
        ]
        place = f"; given: {', '.join(named)}" if named else ""
        ours = isinstance(error.__cause__ or error, Refused)
        who = "" if ours else "Megatron rejects it: "
        raise ConfigError(f"{config.name}: {who}{error}{place}") from error


def arithmetic(config: Config) -> dict[str, int]:
    """Computes world size and batch sizes as Megatron divides them.

    Returns:
        ``world_size``, ``tensor``, ``pipeline``, ``context``, ``data_parallel``,
        ``micro_batch_size``, ``global_batch_size`` and ``micro_batches`` of a rank's step.

    Raises:
        ConfigError: a number does not divide; the message names the lines and numbers that would.
    """
    sizes = [f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context")]
    tensor, pipeline, context = (whole(config, size, 1) for size in sizes)
    world = config.world_size
    model = tensor * pipeline * context
    layout = f"tensor {tensor} x pipeline {pipeline} x context {context}"
    if world % model:
        given = [f"arguments.{size}" for size in sizes] + ["launch.nodes", "launch.nproc_per_node"]
        places = sorted({config.where(key) for key in given if key in config.origins})
        raise ConfigError(
            f"{', '.join(places)}: {config.launch.nodes} nodes x "
            f"{config.launch.nproc_per_node} ranks = {world} ranks do not divide by {layout} = "
            f"{model}; use a multiple of {model}, or another layout"
        )
    data = world // model
    micro = whole(config, "micro_batch_size")
    batch = whole(config, "global_batch_size", micro * data)
    if batch % (micro * data):
        fits = micro * data * max(1, round(batch / (micro * data)))
        ranks = [d for d in range(1, batch // micro + 1) if batch % (micro * d) == 0]
        near = min(ranks, key=lambda d: abs(d - data)) * model if ranks else model
        raise ConfigError(
            f"{config.where('global_batch_size')}: global_batch_size {batch} does not divide by "
            f"micro_batch_size {micro} ({config.where('micro_batch_size')}) x {data} data-parallel "
            f"ranks ({world} ranks, {layout}); {fits} would, or {near} ranks"
        )
    return {
        "world_size": world,
        "tensor": tensor,
        "pipeline": pipeline,
        "context": context,
        "data_parallel": data,
        "micro_batch_size": micro,
        "global_batch_size": batch,
        "micro_batches": batch // (micro * data),
    }


def schedule(config: Config) -> None:
    """Checks that the warmup is shorter than the schedule of the learning rate.

    Raises:
        ConfigError: it is not; the message names the lines of both.
    """
    given = config.arguments
    kind = "iters" if "train_iters" in given else "samples"
    if f"train_{kind}" not in given:
        return
    end = f"lr_decay_{kind}" if f"lr_decay_{kind}" in given else f"train_{kind}"
    steps = whole(config, end)
    if "lr_warmup_fraction" in given:
        name = "lr_warmup_fraction"
        try:
            warmup = float(str(given[name])) * steps
        except ValueError:
            return  # Megatron's parser names it
    else:
        name = f"lr_warmup_{kind}"
        warmup = whole(config, name, 0, least=0)
    if warmup >= steps:
        raise ConfigError(
            f"{config.where(name)}: {name} {given[name]} is not shorter than {end} {steps} "
            f"({config.where(end)}), so the learning rate has no time to decay; use a shorter "
            f"warmup (--set {name}={(0.1 if 'fraction' in name else steps // 10)})"
        )


def iterations(config: Config) -> int:
    """Returns the iteration at which training ends.

    Raises:
        ConfigError: the configuration does not determine it.
    """
    given = config.arguments
    if "train_samples" not in given or "train_iters" in given:  # Megatron rejects both
        if "train_iters" not in given:
            raise ConfigError(
                f"{config.name}: no file sets train_iters or train_samples; add one of them under "
                "arguments"
            )
        return whole(config, "train_iters")
    for name in ("rampup_batch_size", "step_batch_size_schedule"):
        if name in given:
            raise ConfigError(
                f"{config.where(name)}: with {name}, train_samples does not determine the last "
                "iteration; set train_iters instead"
            )
    return whole(config, "train_samples") // arithmetic(config)["global_batch_size"]


def refuse_missing_gpus(config: Config) -> None:
    """Checks that this node has a GPU for each rank.

    Raises:
        ConfigError: it has fewer; the message names both numbers.
    """
    if config.arguments.get("plugin_device") != "cuda" or not importlib.util.find_spec("torch"):
        return
    tell("counting this node's GPUs with torch")
    import torch

    with environment(config):
        there = torch.cuda.device_count()
    if there < config.launch.nproc_per_node:
        raise ConfigError(
            f"torch finds {there} GPUs on this node, and the configuration needs "
            f"{config.launch.nproc_per_node} (launch.nproc_per_node, "
            f"{config.where('launch.nproc_per_node')}; plugin_device cuda, "
            f"{config.where('plugin_device')}); set plugin_device=cpu to train without GPUs"
        )


def _own_values(config: Config) -> None:
    """Checks hyperparameters of the plugin's optimizers; this needs no Megatron."""
    from megatron_s3.optimizers import OPTIMIZERS

    cls = OPTIMIZERS.get(str(config.arguments.get("optimizer")))
    if cls is None:
        return
    for h in cls.description.hyperparameters:
        name = f"{cls.description.name}_{h.name}".replace("-", "_")
        value = config.arguments.get(name)
        if h.is_switch or not isinstance(value, str):
            continue
        try:
            number = float(value)
        except ValueError:
            continue  # Megatron's parser names it
        try:
            h.check(number, name)
        except ValueError as error:
            raise ConfigError(f"{config.where(name)}: {error}") from None


def whole(config: Config, name: str, default: int | None = None, least: int = 1) -> int:
    """Returns the value of an argument that is a whole number.

    Args:
        config: the configuration.
        name: the argument's name.
        default: the value if the argument is not given; None if the argument is required.
        least: the smallest value allowed.

    Raises:
        ConfigError: a required argument is missing, or the value is not a whole number of at least
            ``least``.
    """
    value = config.arguments.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise ConfigError(f"{config.name}: no file sets {name}; add it under arguments")
    if not isinstance(value, str) or not value.isdecimal() or int(value) < least:
        raise ConfigError(
            f"{config.where(name)}: {name} must be a whole number of at least {least}, not "
            f"{value!r}"
        )
    return int(value)


def _names_and_values(config: Config, parser: argparse.ArgumentParser) -> None:
    """Checks each argument against Megatron's parser, so that an error can name its line."""
    options = {
        option.removeprefix("--").replace("-", "_"): action
        for option, action in parser._option_string_actions.items()
    }
    for name, value in config.arguments.items():
        where = config.where(name)
        action = options.get(name)
        if action is None:
            near = difflib.get_close_matches(name, options, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{where}: this Megatron has no argument {name!r}{hint}")
        if action.nargs == 0:
            if value is not True:
                raise ConfigError(f"{where}: {name} is a switch: true or false, not {value!r}")
            continue
        if isinstance(value, bool):
            raise ConfigError(f"{where}: {name} needs a value")
        if isinstance(value, list) and action.nargs is None:
            raise ConfigError(f"{where}: {name} takes one value, not a list")
        for item in value if isinstance(value, list) else [value]:
            _value(parser, action, item, f"{where}: {name}")


def _value(parser: argparse.ArgumentParser, action: Any, text: str, what: str) -> None:
    try:
        value = parser._get_value(action, text)
        parser._check_value(action, value)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{what}: {error.message}") from None
