"""Submits a configuration: sbatch's options from it, and the job's body from scripts/."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_s3.launch.check import arithmetic, ask_megatron
from megatron_s3.launch.config import Config, shipped

__all__ = ["SlurmError", "command", "submit"]


class SlurmError(Exception):
    """The job could not be submitted; the message says why."""


def body() -> Path:
    """The job's script, as it came with the package."""
    return shipped().parent / "scripts" / "pretrain.sbatch"


def command(config: Config, words: list[str], run_dir: Path, tasks: int) -> list[str]:
    """The sbatch command line.

    Args:
        config: gives nodes, time and further options of sbatch, which win over those set here.
        words: what ``megatron-s3 launch`` takes on the nodes: files and overrides.
        run_dir: where the job writes.
        tasks: number of runs in the array, or 0 for a single job.
    """
    folder = run_dir.absolute()
    options = {
        "job-name": config.name,
        "nodes": str(config.launch.nodes),
        "output": str(folder / ("slurm-%A_%a.out" if tasks else "slurm-%j.out")),
        "open-mode": "append",
    }
    if config.launch.time:
        options["time"] = config.launch.time
    asks_for_gpus = any(name.startswith(("gpus", "gres")) for name in config.launch.sbatch)
    if config.arguments.get("s3_device", "cuda") != "cpu" and not asks_for_gpus:
        options["gpus-per-node"] = str(config.launch.nproc_per_node)
    if tasks:
        options["array"] = f"0-{tasks - 1}"
    options |= config.launch.sbatch
    given = [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]
    return ["sbatch", *given, str(folder / body().name), *words]


def submit(config: Config, args: argparse.Namespace, run_dir: Path, tasks: int) -> int:
    """Checks, then submits, or with ``--dry-run`` prints what it would.

    Raises:
        ConfigError: the configuration cannot run.
        SlurmError: there is no sbatch, or it refused.
    """
    arithmetic(config)
    ask_megatron(config)
    words = [args.config, *args.overlay]
    for override in args.sets:
        words += ["--set", override]
    line = command(config, words, run_dir, tasks)
    print(f"RUN_DIR={shlex.quote(str(run_dir.absolute()))} {shlex.join(line)}")
    if args.dry_run:
        return 0
    if not shutil.which("sbatch"):
        raise SlurmError("there is no sbatch on this machine: submit from a login node")
    run_dir.mkdir(parents=True, exist_ok=True)
    shutil.copy(body(), run_dir / body().name)
    with open(run_dir / "submitted.txt", "a") as file:
        file.write(shlex.join(line) + "\n")
    run = subprocess.run(line, env=os.environ | {"RUN_DIR": str(run_dir.absolute())})
    if run.returncode:
        raise SlurmError(f"sbatch refused it (status {run.returncode}); what it says is above")
    sys.stdout.flush()
    return 0
