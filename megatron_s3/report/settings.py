"""Runs in which one setting is varied, each against AdamW with the same setting."""

import math
import statistics
from collections.abc import Sequence

from megatron_s3.report.compare import (
    Table,
    about,
    adamw_label,
    difference,
    finalists,
    gaps,
    labels,
    losses,
    tested,
)
from megatron_s3.report.runs import Suite, Trained

__all__ = ["USUAL", "tables", "varied"]

#: By experiment, the setting of the runs to which the others are compared.
USUAL = {
    "batch size": "16",
    "beta": "0.95",
    "schedule": "cosine to a tenth",
    "lr x weight decay": "3e-05",
    "layers": "2",
}


def varied(suite: Suite) -> dict[str, dict[str, list[Trained]]]:
    """Returns the runs by experiment and setting, settings that are numbers in their order.

    The runs with the usual settings are those of the suite's smallest model that were trained on as
    many samples as the others.
    """
    smallest = suite.of_size(suite.sizes[0]) if suite.sizes else []
    found = {}
    for experiment, setting in USUAL.items():
        others = suite.of(experiment)
        if not others:
            continue
        count = _samples(others[0])
        alike = [run for run in smallest if math.isclose(_samples(run), count, rel_tol=0.01)]
        of = {setting: alike} if alike else {}
        for run in others:
            of.setdefault(str(run.tags["setting"]), []).append(run)
        found[experiment] = dict(sorted(of.items(), key=lambda item: _order(item[0])))
    return found


def _samples(run: Trained) -> int:
    return run.iterations * int(run.start.get("global_batch_size", 1))


def _order(setting: str) -> tuple[float, str]:
    try:
        return float(setting), setting
    except ValueError:
        return math.inf, setting


def tables(suites: Sequence[Suite]) -> list[Table]:
    """Returns a table for each setting that was varied."""
    return [
        _table(suite, experiment, of)
        for suite in suites
        for experiment, of in varied(suite).items()
    ]


def _table(suite: Suite, experiment: str, of: dict[str, list[Trained]]) -> Table:
    every = [run for runs in of.values() for run in runs if run.finished]
    by_test = tested(every)
    trained = {run.label for runs in of.values() for run in runs if "setting" in run.tags}
    against = adamw_label(every)
    others = [label for label in labels(every) if label != against and label in trained]
    rows = []
    for setting, runs in of.items():
        row = [setting]
        base = finalists(runs, against) if against else []
        for label in ([against] if against else []) + others:
            final = finalists(runs, label)
            ends = losses(final, by_test)
            row += [f"{statistics.fmean(ends):.4f}", f"{final[0].lr:g}"] if final else ["-", "-"]
            if against and label != against:
                row += [difference(final, base, by_test), str(len(gaps(final, base)))]
        rows.append(row)
    heads = [experiment, *([against, "its learning rate"] if against else [])]
    for label in others:
        heads += [label, "its learning rate"]
        heads += [f"minus {against}", "seeds"] if against else []
    return Table(
        f"{about(suite, experiment)}loss with other settings",
        heads,
        rows,
        "Every learning rate is the best of those that were tried with the setting. Differences "
        "are taken seed by seed.",
    )
