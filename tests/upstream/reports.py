"""How a test of several ranks ended, from what each of them reported."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["log", "merge", "read"]


def merge(reports: list[list[dict[str, Any]]], killed: str | None) -> dict[str, Any]:
    """How a test ended, from what its ranks reported of its phases.

    Args:
        reports: of every rank, of every phase that ended: ``when``, ``outcome``, ``time``,
            ``error``, ``at``, ``optimizers``, ``steps``.
        killed: why ranks were killed, if any were.

    Returns:
        ``outcome`` (passed, failed or skipped), ``error`` and ``at`` (of the rank that failed
        first: its peers fail of its absence), ``optimizers`` and ``steps`` (of all ranks).
    """
    every = [report for rank in reports for report in rank]
    failed = sorted((r for r in every if r["outcome"] == "failed"), key=lambda r: r["time"])
    skipped = [r for r in every if r["outcome"] == "skipped"]
    unfinished = sum(not rank or rank[-1]["when"] != "teardown" for rank in reports)
    first = {"error": "", "at": ""}
    if failed:
        outcome, first = "failed", failed[0]
    elif killed or unfinished:
        outcome = "failed"
        first = {"error": killed or f"{unfinished} ranks died without a report", "at": ""}
    elif len(skipped) == len(reports):
        outcome, first = "skipped", skipped[0]
    else:
        outcome = "passed"
    steps: Counter[str] = Counter()
    for report in every:
        for name, count in report.get("steps", {}).items():
            steps[name] = max(steps[name], count)
    return {
        "outcome": outcome,
        "error": first["error"],
        "at": first["at"],
        "optimizers": sorted({name for r in every for name in r.get("optimizers", ())}),
        "steps": dict(sorted(steps.items())),
    }


_result_of_last: dict[str, Any] = {}


def read(file: Path) -> list[dict[str, Any]]:
    """Returns the reports of a rank's phases; none where it wrote no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def log(folder: Path, reports: list[list[dict[str, Any]]]) -> str:
    """The first failed rank's traceback, then what the ranks printed last."""
    failed = [r for rank in reports for r in rank if r["outcome"] == "failed"]
    first = min(failed, key=lambda r: r["time"], default={}).get("traceback", "")
    ends = [
        f"--- rank {file.stem}\n{file.read_text(errors='replace')[-3000:]}"
        for file in sorted(folder.glob("*.log"))
    ]
    return "\n".join([first, *ends])
