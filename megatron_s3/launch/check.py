"""Whether a configuration can run: its arithmetic, and Megatron's own parser and validation."""

import argparse
import difflib
import importlib.util
import re
from typing import Any

from megatron_s3.launch.config import Config, ConfigError

__all__ = ["arithmetic", "ask_megatron", "check", "megatron_is_here", "whole"]


def megatron_is_here() -> bool:
    """Whether torch and a Megatron with a trainer can be imported."""
    try:
        return all(importlib.util.find_spec(name) for name in ("torch", "megatron.training"))
    except ModuleNotFoundError:
        return False


def ask_megatron(config: Config, more: list[str] | None = None) -> None:
    """As :func:`check`; where there is no Megatron, says so and leaves it to the job's nodes."""
    if megatron_is_here():
        check(config, more)
    else:
        print("Megatron is not installed here: its own checks are left to the nodes of the job")


def check(config: Config, more: list[str] | None = None) -> argparse.Namespace:
    """Refuses what could not run.

    Args:
        config: what to check.
        more: Megatron's words beside the configuration's own (the dataset's).

    Returns:
        Megatron's arguments, validated.

    Raises:
        ConfigError: naming file, line and reason.
        ImportError: there is no Megatron to ask; :func:`arithmetic` can be asked without.
    """
    from megatron_s3.mcore import parse

    words = [*config.words(), *(more or [])]
    arithmetic(config)
    parse.prepare(words)
    _names_and_values(config, parse.parser())
    try:
        return parse.parse(words, config.world_size)
    except ValueError as error:
        named = [
            f"{name} ({config.where(name)})"
            for name in config.arguments
            if re.search(rf"(?<![\w-])(--)?{_pattern(name)}(?![\w-])", str(error))
        ]
        place = f"; given: {', '.join(named)}" if named else ""
        raise ConfigError(f"{config.name}: Megatron refuses it: {error}{place}") from error


def _pattern(name: str) -> str:
    return re.escape(name).replace("_", "[-_ ]")


def arithmetic(config: Config) -> dict[str, int]:
    """World size and batch, as Megatron will divide them.

    Returns:
        ``world_size``, ``tensor``, ``pipeline``, ``context``, ``data_parallel``,
        ``micro_batch_size``, ``global_batch_size`` and ``micro_batches`` of a rank's step.

    Raises:
        ConfigError: something does not divide, naming the lines and what would.
    """
    tensor, pipeline, context = (
        whole(config, f"{kind}_parallel_size", 1)
        for kind in ("tensor_model", "pipeline_model", "context")
    )
    world = config.world_size
    model = tensor * pipeline * context
    layout = f"tensor {tensor} x pipeline {pipeline} x context {context}"
    if world % model:
        places = {
            config.where(f"{kind}_parallel_size")
            for kind in ("tensor_model", "pipeline_model", "context")
            if f"{kind}_parallel_size" in config.arguments
        } | {
            str(config.origins[key])
            for key in ("launch.nodes", "launch.nproc_per_node")
            if key in config.origins
        }
        raise ConfigError(
            f"{', '.join(sorted(places))}: {config.launch.nodes} nodes x "
            f"{config.launch.nproc_per_node} ranks = {world} ranks do not divide by {layout} = "
            f"{model}; take a multiple of {model}, or another layout"
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


def whole(config: Config, name: str, default: int | None = None) -> int:
    """The value of an argument that counts something.

    Args:
        config: that gives it.
        name: of the argument.
        default: where it is not given; None if it has to be.

    Raises:
        ConfigError: it is not given, or is no whole number from 1.
    """
    value = config.arguments.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise ConfigError(f"{config.name}: {name} is given by no file; add it under arguments")
    if not isinstance(value, str) or not value.isdecimal() or int(value) < 1:
        raise ConfigError(
            f"{config.where(name)}: {name} must be a whole number from 1, not {value!r}"
        )
    return int(value)


def _names_and_values(config: Config, parser: argparse.ArgumentParser) -> None:
    """Compares each argument with the parser's, so that an error can name its line."""
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
        if value is True:
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
