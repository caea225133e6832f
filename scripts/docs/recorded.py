"""Runs of a recorded `report.json`, from which the tables of a report are made again."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_s3.report.runs import Suite, Trained

__all__ = ["suites"]


def suites(path: Path) -> list[Suite]:
    """Returns the suites of a file that `megatron-s3 report` wrote, with rounded losses.

    Times and updates are not in them.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    return [
        Suite(suite["suite"], [_run(path, run) for run in suite["runs"]], tuple(suite["megatron"]))
        for suite in found
    ]


def _run(path: Path, run: Mapping[str, Any]) -> Trained:
    start = {"kind": "start", "iteration": 0, "train_iters": run["iterations"]}
    records: list[dict[str, Any]] = [start | {"bound": run["bound"]}]
    records += [{"kind": "train", "iteration": i, "loss": loss} for i, loss in run["loss"]]
    records += [{"kind": "valid", "iteration": i, "loss": loss} for i, loss in run["valid"]]
    if "test" in run:
        records.append({"kind": "test", "iteration": run["iterations"], "loss": run["test"]})
    lr = float(run["lr"]) if run["lr"] is not None else math.nan
    return Trained(
        path, run["experiment"], run["label"], run["optimizer"], lr, run["seed"], run["tags"],
        records, (),
    )  # fmt: skip
