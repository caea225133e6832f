"""`megatron-s3 configs`: lists the configurations and checks them with Megatron."""

import argparse
import sys
from collections.abc import Sequence

from megatron_s3.launch.check import arithmetic, check, iterations, megatron_is_here
from megatron_s3.launch.config import Config, ConfigError, load
from megatron_s3.launch.config_paths import shipped
from megatron_s3.launch.planning import planned
from megatron_s3.launch.selection import array_tasks
from megatron_s3.log import tell

__all__ = ["main", "names"]

_COLUMNS = ("configuration", "parameters", "ranks", "d x t x p", "batch", "iterations", "tokens")


def names() -> list[str]:
    """Returns the shipped configurations that can be run; others are only extended."""
    found = (path.relative_to(shipped()).with_suffix("") for path in shipped().rglob("*.yaml"))
    runnable = (path for path in found if path.parts[0] not in ("models", "base"))
    return [str(path) for path in sorted(runnable, key=lambda path: (len(path.parts), path))]


def main(argv: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="megatron-s3 configs",
        description=(
            "Check the shipped configurations (or FILES) with the parser and the validation of "
            "the installed Megatron, and print a table."
        ),
    )
    parser.add_argument(
        "files", nargs="*", help="configurations to check instead of the shipped ones"
    )
    args = parser.parse_args(argv)
    if not megatron_is_here():
        print(
            "error: Megatron is not installed: pip install 'megatron-core>=0.17'", file=sys.stderr
        )
        return 2
    configs, rejected = [], 0
    for name in args.files or names():
        try:
            configs.append((name, load([name])))
        except ConfigError as error:
            rejected += 1
            _say(error)
    if not configs:
        return 2
    tell(f"checking {len(configs)} configurations with Megatron; the import takes a few seconds")
    rows = _rows(configs)
    rejected += len(configs) - len(rows)
    _print([_COLUMNS, *rows])
    from megatron_s3.mcore.planning.parse import release

    print(f"megatron-core {release()}: {len(rows)} accepted, {rejected} rejected")
    return 2 if rejected else 0


def _say(error: ConfigError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def _rows(configs: list[tuple[str, Config]]) -> list[tuple[str, ...]]:
    """Returns a row of the table for each configuration that Megatron accepts."""
    # A process that has checked a job for CPUs rejects jobs for GPUs.
    configs = sorted(configs, key=lambda c: c[1].arguments.get("plugin_device") == "cpu")
    checked = []
    for name, config in configs:
        try:
            for sets in array_tasks(config).values() if config.array else ():
                check(load([name], sets))
            checked.append((name, config, check(config), iterations(config)))
        except ConfigError as error:
            _say(error)
    # Tensor parallelism changes the padding of the vocabulary.
    parameters: dict[tuple[object, ...], str] = {}
    rows: list[tuple[str, ...]] = []
    for name, config, args, steps in checked:
        shape = arithmetic(config)
        model = (args.num_layers, args.hidden_size, args.vocab_size, shape["tensor"])
        if args.vocab_size is None and args.padded_vocab_size is None:
            parameters[model] = "by its dataset"
        elif model not in parameters:
            parameters[model] = _parameters(config, args)
        tokens = shape["global_batch_size"] * args.seq_length * steps
        if config.array:
            each = (f"{key}: {', '.join(values)}" for key, values in config.array.items())
            name += f" ({'; '.join(each)})"
        rows.append(
            (
                name,
                parameters[model],
                str(shape["world_size"]),
                f"{shape['data_parallel']} x {shape['tensor']} x {shape['pipeline']}",
                f"{shape['global_batch_size']} = {shape['data_parallel']} x "
                f"{shape['micro_batch_size']} x {shape['micro_batches']}",
                f"{steps:,}",
                f"{tokens / 1e9:.4g} B",
            )
        )
    return rows


def _parameters(config: Config, args: argparse.Namespace) -> str:
    try:
        return f"{planned(config, args)[1].parameters:,}"
    except ConfigError as error:  # Megatron accepts what a plan cannot count
        tell(str(error))
        return "not counted"


def _print(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for name, *cells in rows:
        aligned = (cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *aligned]))
