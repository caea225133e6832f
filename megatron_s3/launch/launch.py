"""`megatron-s3 launch`: starts the ranks of a configuration on this node, or submits it to SLURM.

In a SLURM job, one task on each node runs this command; it reads the node rank and the address of
the first node from SLURM_NODEID, MASTER_ADDR and MASTER_PORT. At SIGTERM, SIGINT, SIGHUP, SIGUSR1,
SIGUSR2 and SIGXCPU the ranks save a checkpoint and end (:mod:`megatron_s3.launch.stopping`).

Exit status: 0, training is finished (also if it was finished before), or a checkpoint was converted
(``ckpt_convert_save``); 75, stopped before the end with a checkpoint saved, and the same command
resumes from it; 2, the configuration cannot run; 130, interrupted without saving; other values, the
ranks failed.
"""

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_s3.launch import lock, provenance, slurm
from megatron_s3.launch.check import arithmetic, ask_megatron, refuse_missing_gpus, schedule
from megatron_s3.launch.commands import MEETING, first_node, megatron_words, shell_word, torchrun
from megatron_s3.launch.config import Config, ConfigError, load
from megatron_s3.launch.content import changed
from megatron_s3.launch.progress import (
    Progress,
    continued,
    progress,
    refuse_another,
    save_folder,
)
from megatron_s3.launch.redact import HIDDEN, is_secret
from megatron_s3.launch.resolved import refuse_credentials
from megatron_s3.launch.selection import (
    add_config_arguments,
    add_run_arguments,
    array_tasks,
    resolve,
    run_dir_of,
)
from megatron_s3.launch.stopping import StopRequest, exit_signal
from megatron_s3.log import say
from megatron_s3.storage.layout import TRACKER

__all__ = ["STOPPED", "main"]

#: EX_TEMPFAIL: stopped before the end, and to be started again.
STOPPED = 75


def main(argv: list[str]) -> int:
    """Runs the command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="megatron-s3 launch",
        description="Train a configuration on this node, or submit it to SLURM. The same command "
        "resumes from the newest checkpoint in the run folder.",
    )
    add_config_arguments(parser)
    add_run_arguments(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--slurm", action="store_true", help="submit with sbatch")
    mode.add_argument("--print-run-dir", action="store_true", help="print the run folder and exit")
    mode.add_argument(
        "--print-checkpoint",
        action="store_true",
        help="print the iteration of the newest complete checkpoint (0: none) and exit",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the configuration, print the commands and exit",
    )
    args = parser.parse_intermixed_args(argv)
    try:
        return _main(args)
    except (ConfigError, slurm.SlurmError, lock.InUse) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _main(args: argparse.Namespace) -> int:
    if args.slurm:
        config = load([args.config, *args.overlay], args.sets)
        if args.task is not None:
            raise ConfigError(f"--task {args.task} selects a run on this node; leave out --slurm")
        tasks = array_tasks(config) if config.array else {}
        for name, sets in (tasks or {"": []}).items():
            one = load([args.config, *args.overlay], [*args.sets, *sets])
            _check(one, run_dir_of(args) / name, in_container=bool(os.environ.get("CONTAINER")))
        return slurm.submit(config, run_dir_of(args), len(tasks), args.dry_run)
    config, run_dir = resolve(args)
    if args.print_run_dir:
        print(run_dir)
        return 0
    if args.print_checkpoint:
        print(progress(config, run_dir).saved or 0)
        return 0
    stop = StopRequest(exit_signal(config))
    with contextlib.nullcontext() if args.dry_run else stop:
        return _launch(config, run_dir, args.dry_run, stop)


def _check(
    config: Config, run_dir: Path, in_container: bool = False
) -> tuple[list[str], list[str]]:
    """Checks a configuration, for a launch on this node and for a submitted one.

    Args:
        config: the configuration of one run.
        run_dir: its folder.
        in_container: whether the ranks run in a container and see other folders.

    Returns:
        Megatron's command line, and the arguments that apply only to the start of the run and are
        no longer used.

    Raises:
        ConfigError: naming file, line and reason.
    """
    refuse_credentials(config)
    exit_signal(config)
    arithmetic(config)
    schedule(config)
    _refuse_folder(run_dir, "--run-dir")
    _refuse_folder(progress(config, run_dir).folder, config.where("save"))
    told, left_out = continued(config, run_dir)
    try:
        words = megatron_words(told, run_dir)
    except ConfigError as error:
        if not in_container or not config.dataset:
            raise
        say(f"{error}; the job looks for this file in its container")
        words = told.words()
    if first_node():  # asked once
        ask_megatron(told, words[len(told.words()) :])
    return words, left_out


def _refuse_folder(folder: Path, given: str) -> None:
    """Checks that a folder exists or can be created, and can be written."""
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"{given}: {there} is not a folder, and {folder} must be one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{given}: {there} cannot be written to")


def _launch(config: Config, run_dir: Path, dry_run: bool, stop: StopRequest) -> int:
    _check_job(config, dry_run)
    shape = arithmetic(config)
    before = progress(config, run_dir)
    if before.finished and not dry_run:
        compared = refuse_another(config, run_dir)
        unknown = "" if compared else f" ({run_dir} does not record with which configuration)"
        say(f"training is already finished: iteration {before.saved} of {before.last}{unknown}")
        return 0
    if not dry_run:
        refuse_missing_gpus(config)
        script = config.launch.script
        if script and not os.path.isfile(script):
            raise ConfigError(f"{config.where('launch.script')}: there is no script {script}")
    words, left_out = _check(config, run_dir)
    command = torchrun(config, words)
    say(
        f"{config.name}: {shape['world_size']} ranks on {config.launch.nodes} nodes = data "
        f"{shape['data_parallel']} x tensor {shape['tensor']} x pipeline {shape['pipeline']} x "
        f"context {shape['context']}; batch {shape['global_batch_size']}, on a rank "
        f"{shape['micro_batches']} micro-batches of {shape['micro_batch_size']}; in {run_dir}"
    )
    if dry_run:
        print(config.yaml())
        for name, value in config.launch.environment.items():
            hidden = HIDDEN if is_secret(name, value) else ""
            print(f"export {name}={hidden or shlex.quote(value)}")
        print(" ".join(map(shell_word, command)))
        return 0
    with _alone(config, run_dir) as held:
        before = progress(config, run_dir)
        if before.saved is not None:
            say(f"resuming from iteration {before.saved} in {before.folder}")
            if changed(config, run_dir):
                say(
                    "the dataset differs from that of the start of the run; training continues "
                    "after the same number of samples, in the order of the new dataset"
                )
            if left_out:
                say(f"left out because the run has saved a checkpoint: {', '.join(left_out)}")
        try:
            provenance.record(run_dir, config, command)
        except OSError as error:
            say(f"cannot write the record of this attempt ({error}); training starts anyway")
        # Even if a stop was requested already: the ranks of other nodes may be waiting for these.
        with stop.start(command, os.environ | config.launch.environment | held) as process:
            status = process.wait()
        after = progress(config, run_dir)
    if stop.killed:
        say(
            "interrupted twice; the ranks ended without saving, and the newest checkpoint is "
            f"{after.saved}"
        )
        return 130
    if not status and (converted := _converted(config)):
        say(f"checkpoint converted into {converted}; nothing was trained")
        return 0
    return _ended(run_dir, status, before, after, stop.asked_by)


def _converted(config: Config) -> Path | None:
    """Returns where Megatron wrote a checkpoint in another format; None if it did not."""
    form, into = (config.arguments.get(f"ckpt_convert_{name}") for name in ("format", "save"))
    folder = Path(str(into)) / str(form)
    return folder if form and into and (folder / TRACKER).is_file() else None


def _ended(
    run_dir: Path, status: int, before: Progress, after: Progress, asked_by: str | None
) -> int:
    """Logs how the ranks ended, and returns the launcher's exit status."""
    saved = (after.saved or 0) > (before.saved or 0)
    if status and not (asked_by and saved):
        say(f"the ranks ended with status {status}; the newest checkpoint is {after.saved}")
        return status if status > 0 else 128 - status  # as a shell reports a signal
    if after.finished or after.last is None:
        how = "training is finished" if after.finished else "the ranks have ended"
        say(f"{how}: iteration {after.saved}, checkpoints in {after.folder}")
        if (run_dir / "tensorboard" / "metrics.jsonl").exists():
            say(f"megatron-s3 report {run_dir} makes tables and pictures of this run")
        return 0
    why = f"{asked_by} received" if asked_by else "Megatron ended early"
    if saved:
        say(f"stopped at iteration {after.saved} of {after.last} ({why}); the same command resumes")
        return STOPPED
    say(
        f"the ranks ended ({why}) without saving: the newest checkpoint in {after.folder} is "
        f"{after.saved}, and training ends at {after.last}"
    )
    return 1


@contextlib.contextmanager
def _alone(config: Config, run_dir: Path) -> Iterator[dict[str, str]]:
    """Locks the run's folder and that of its checkpoints, on the first node, for all nodes."""
    folders = [run_dir, save_folder(config, run_dir)]
    if not first_node():
        yield lock.variable(folders)
        return
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(lock.hold(folders))
        except OSError as error:  # no checkpoint could be written there
            named = " and ".join(map(str, folders))
            raise ConfigError(f"cannot write to {named}: {error}") from error
        yield held


def _check_job(config: Config, dry_run: bool) -> None:
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "0"))
    if nodes and nodes != config.launch.nodes:
        raise ConfigError(
            f"launch.nodes is {config.launch.nodes} ({config.where('launch.nodes')}), but the "
            f"SLURM job has {nodes} nodes; submit with --nodes={config.launch.nodes}, or --set "
            f"launch.nodes={nodes}"
        )
    if config.launch.nodes > 1 and not dry_run:
        missing = [name for name in MEETING.values() if name not in os.environ]
        if missing:
            raise ConfigError(
                f"{config.launch.nodes} nodes, but {', '.join(missing)} is not set; submit with "
                "--slurm, or set the variables and run this command on each node"
            )
