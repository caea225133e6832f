"""Selection of the configuration, of the run of an array, and of its folder by a command."""

import argparse
import itertools
import os
from pathlib import Path
from urllib.parse import quote

from megatron_s3.launch.config import Config, ConfigError, load
from megatron_s3.launch.config_paths import name_of

__all__ = ["add_config_arguments", "add_run_arguments", "array_tasks", "resolve", "run_dir_of"]


#: What stands as it is in the name of a run of an array, beside letters, digits and ``_.-~``.
_IN_A_NAME = "+,=:@"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds CONFIG, OVERLAY and --set, for every verb that takes a configuration."""
    parser.add_argument("config", help="a YAML file, or the name of a shipped one (gpt2-7b-s3)")
    parser.add_argument("overlay", nargs="*", help="more files; the later ones win")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="sets",
        help="override an argument of Megatron's, dataset, or launch.NAME; may be repeated",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --run-dir and --task."""
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="where everything is written (default: $RUN_DIR, else runs/NAME)",
    )
    parser.add_argument(
        "--task",
        type=int,
        metavar="K",
        help="the K-th run, from 0, of a configuration with an array (default: "
        "$SLURM_ARRAY_TASK_ID)",
    )


def resolve(args: argparse.Namespace) -> tuple[Config, Path]:
    """Returns the configuration and run directory that are meant, those of the array's task.

    Args:
        args: of :func:`add_config_arguments` and :func:`add_run_arguments`.

    Raises:
        ConfigError: the files cannot be read, or no run of the array is chosen.
    """
    config = load([args.config, *args.overlay], args.sets)
    if not config.array:
        # $SLURM_ARRAY_TASK_ID alone says nothing: jobs that follow one another can be an array too.
        if args.task is not None:
            raise ConfigError(
                f"--task {args.task}: {config.name} is one run, since no file gives an array; "
                "leave --task out, or add what differs between the runs (--set array.seed=[1,2])"
            )
        return config, run_dir_of(args)
    tasks = array_tasks(config)
    task = args.task
    if task is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        task = int(os.environ["SLURM_ARRAY_TASK_ID"])
    if task is None:
        raise ConfigError(
            f"{config.name} is an array of {len(tasks)} runs ({', '.join(tasks)}): submit it "
            "with --slurm, or run one of them with --task K"
        )
    if not 0 <= task < len(tasks):
        raise ConfigError(f"--task {task}: the array has the runs 0 to {len(tasks) - 1}")
    name, sets = list(tasks.items())[task]
    return load([args.config, *args.overlay], [*args.sets, *sets]), run_dir_of(args) / name


def run_dir_of(args: argparse.Namespace) -> Path:
    """Returns the folder of the run, or of the runs of an array."""
    names = [name_of(name) for name in (args.config, *args.overlay)]
    return Path(args.run_dir or os.environ.get("RUN_DIR") or "runs/" + "-".join(names))


def array_tasks(config: Config) -> dict[str, list[str]]:
    """Returns the runs of an array, name -> overrides: all combinations of its values.

    A name is that of one folder in the run's own: what a path would take for more is written as in
    URLs.

    Raises:
        ConfigError: two runs would have one folder, or a name is longer than a folder's may be.
    """
    tasks: dict[str, list[str]] = {}
    for values in itertools.product(*config.array.values()):
        pairs = list(zip(config.array, values, strict=True))
        name = "-".join(quote(f"{key}-{value}", safe=_IN_A_NAME) for key, value in pairs)
        where = ", ".join(str(config.origins[f"array.{key}"]) for key in config.array)
        if name in tasks:
            raise ConfigError(f"{where}: the array has the run {name} twice; remove one")
        if len(name) > 255:
            raise ConfigError(
                f"{where}: the folder of a run of the array would be called {name}, and a file "
                "system takes names of at most 255 bytes: give shorter values, or each run a file"
            )
        tasks[name] = [f"{key}={value}" for key, value in pairs]
    return tasks
