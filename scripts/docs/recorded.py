"""Runs of a recorded `report.json`, from which the tables of a report are made again."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_s3.report.runs import Suite, Trained
from scripts.experiments.record import records

__all__ = ["suites"]


def suites(path: Path) -> list[Suite]:
    """Returns the suites of a file that `megatron-s3 report` wrote, with rounded losses.

    The sizes of updates are not in them.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    return [
        Suite(suite["suite"], [_run(path, run) for run in suite["runs"]], tuple(suite["megatron"]))
        for suite in found
    ]


def _run(path: Path, run: Mapping[str, Any]) -> Trained:
    lr = float(run["lr"]) if run["lr"] is not None else math.nan
    return Trained(
        path, run["experiment"], run["label"], run["optimizer"], lr, run["seed"], run["tags"],
        records(run), (),
    )  # fmt: skip
