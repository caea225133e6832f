"""Selection of the configuration, of the run of an array, and of its folder by a command."""

import argparse
import itertools
import os
from pathlib import Path
from urllib.parse import quote

from megatron_s3.launch.config import Config, ConfigError, load
from megatron_s3.launch.config_paths import name_of
from megatron_s3.launch.resolved import as_yaml

__all__ = ["add_config_arguments", "add_run_arguments", "array_tasks", "resolve", "run_dir_of"]


#: Characters besides letters, digits and ``_.-~`` that are kept in the name of an array's run.
_IN_A_NAME = "+,=:@"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds CONFIG, OVERLAY and --set to the parser of a verb."""
    parser.add_argument("config", help="a YAML file, or the name of a shipped one (gpt2-7b-s3)")
    parser.add_argument(
        "overlay", nargs="*", default=[], help="more files; later ones override earlier ones"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="sets",
        help="override a flag of Megatron (lr=1e-3), dataset, or launch.NAME, derived.NAME or "
        "array.NAME; may be repeated",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --run-dir and --task."""
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="folder for all files of the run (default: $RUN_DIR, else runs/NAME)",
    )
    parser.add_argument(
        "--task",
        type=int,
        metavar="K",
        help=(
            "start the K-th run, from 0, of a configuration with an array (default: "
            "$SLURM_ARRAY_TASK_ID)"
        ),
    )


def resolve(args: argparse.Namespace) -> tuple[Config, Path]:
    """Returns the configuration and the run folder, for an array those of the task.

    Args:
        args: parsed arguments of :func:`add_config_arguments` and :func:`add_run_arguments`.

    Raises:
        ConfigError: the files cannot be read, or no run of an array is selected.
    """
    config = load([args.config, *args.overlay], args.sets)
    if not config.array:
        # $SLURM_ARRAY_TASK_ID alone is not enough: a chain of jobs can be a job array too.
        if args.task is not None:
            raise ConfigError(
                f"--task {args.task}: {config.name} is a single run, since no file sets an array; "
                "leave --task out, or add the values that differ between the runs (--set "
                "array.seed=[1,2])"
            )
        return config, run_dir_of(args)
    tasks = array_tasks(config)
    task = args.task
    if task is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        task = int(os.environ["SLURM_ARRAY_TASK_ID"])
    if task is None:
        raise ConfigError(
            f"{config.name} is an array of {len(tasks)} runs ({', '.join(tasks)}); submit it with "
            "--slurm, or start one of them with --task K"
        )
    if not 0 <= task < len(tasks):
        raise ConfigError(f"--task {task}: the array has runs 0 to {len(tasks) - 1}")
    name, sets = list(tasks.items())[task]
    return load([args.config, *args.overlay], [*args.sets, *sets]), run_dir_of(args) / name


def run_dir_of(args: argparse.Namespace) -> Path:
    """Returns the folder of the run, or of the runs of an array."""
    names = [name_of(name) for name in (args.config, *args.overlay)]
    return Path(args.run_dir or os.environ.get("RUN_DIR") or "runs/" + "-".join(names))


def array_tasks(config: Config) -> dict[str, list[str]]:
    """Returns the runs of an array, name -> overrides, for all combinations of its values.

    A name is a single folder in the run's folder; other characters are written as in URLs.

    Raises:
        ConfigError: there is no run, two runs would have the same folder, or a name is too long for
            a folder.
    """
    tasks: dict[str, list[str]] = {}
    where = ", ".join(config.where(f"array.{key}") for key in config.array)
    for values in itertools.product(*config.array.values()):
        pairs = list(zip(config.array, values, strict=True))
        name = "-".join(quote(f"{key}-{value}", safe=_IN_A_NAME) for key, value in pairs)
        if name in tasks:
            raise ConfigError(f"{where}: the array has the run {name} twice; remove one of them")
        if len(name) > 255:
            raise ConfigError(
                f"{where}: the folder of a run of the array would be named {name}, and file names "
                "may have at most 255 bytes; use shorter values, or a file for each run"
            )
        tasks[name] = [f"{key}={_as_set(value)}" for key, value in pairs]
    if not tasks:
        raise ConfigError(f"{where}: the array has no run; give each of its keys a value")
    return tasks


def _as_set(value: str) -> str:
    """Returns a value of an array as --set reads it: a word as itself, also "a #b" or "yes"."""
    if value in ("null", "True", "False") or value.startswith("["):
        return value
    return as_yaml(value)
