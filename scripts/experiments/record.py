"""Finished runs of a committed report, with which an experiment goes on in another folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_s3.telemetry import runlog
from scripts.experiments.suite import Run

__all__ = ["OWN_LENGTH", "records", "restore"]

#: Tags of runs that have a length of their own.
OWN_LENGTH = frozenset(("tokens", "setting"))


def restore(report: Path, out: Path, iterations: int, flags: Sequence[str]) -> int:
    """Writes the runs of a ``report.json`` as the experiments do, except those that are there.

    Args:
        report: what ``megatron-s3 report`` wrote about a folder of experiments.
        out: folder of the experiments that go on.
        iterations: length of their runs, except of those that have a length of their own.
        flags: Megatron's flags for every run.

    Returns:
        The number of runs that were written.

    Raises:
        ValueError: it is no such file, or its runs cannot be compared with those of the folder.
    """
    try:
        suites = json.loads(report.read_text(encoding="utf-8"))
        found = [(run, _run(run)) for suite in suites for run in suite["runs"]]
        lines = [records(run) for run, _ in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{report}: not a report.json of experiments: {error}") from error
    for suite in suites:
        if suite["megatron"] != list(flags):
            raise ValueError(
                f"{report}: its runs have Megatron's flags {suite['megatron']}, these {list(flags)}"
                ": they cannot be compared"
            )
    for run, _ in found:
        if OWN_LENGTH.isdisjoint(run["tags"]) and run["iterations"] != iterations:
            raise ValueError(
                f"{report}: its runs have {run['iterations']} iterations, these {iterations}: "
                "they cannot be compared"
            )
    written = 0
    for (run, planned), text in zip(found, lines, strict=True):
        folder = out / planned.key
        evaluated = run["valid"][-1][0] if run["valid"] else 0
        if evaluated < run["iterations"] or (folder / "run.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / runlog.NAME).write_text("".join(f"{json.dumps(line)}\n" for line in text))
        names = ("experiment", "optimizer", "label", "lr", "seed", "tags", "iterations")
        record = {name: run[name] for name in names}
        record |= {"valid_loss": run["valid"][-1][1], "restored": report.name}
        (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        written += 1
    return written


def _run(run: dict[str, Any]) -> Run:
    return Run(run["experiment"], run["label"], "", run["lr"], run["seed"], run["tags"])


def records(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the records of a run's log that tables and pictures read.

    The sizes of updates are not among them.

    Args:
        run: one of the runs of a ``report.json``.

    Raises:
        KeyError: something is not in it.
    """
    start = {"kind": "start", "iteration": 0, "train_iters": run["iterations"]}
    lines = [start | {"optimizer": run["optimizer"], "bound": run["bound"], **run["start"]}]
    timed = {"seconds": run["seconds"]} if "seconds" in run else {}
    lines += [{"kind": "train", "iteration": i, "loss": loss} | timed for i, loss in run["loss"]]
    lines += [{"kind": "valid", "iteration": i, "loss": loss} for i, loss in run["valid"]]
    if "test" in run:
        lines.append({"kind": "test", "iteration": run["iterations"], "loss": run["test"]})
    return lines + [{"kind": "spike", **spike} for spike in run["spikes"]]
