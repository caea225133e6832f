"""Tables of the steps that AdamW needs for the losses that others reach."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from megatron_s3.report.compare import (
    NOTHING,
    Table,
    adamw_label,
    finalists,
    labels,
    losses,
    tested,
)
from megatron_s3.report.runs import Suite, Trained

__all__ = ["tables"]


def tables(suites: Sequence[Suite]) -> list[Table | None]:
    """Returns tables of the steps that AdamW needs for the losses that others reach."""
    found = []
    for model in dict.fromkeys(suite.model for suite in suites):
        alike = sorted((s for s in suites if s.model == model), key=lambda s: s.iterations)
        named = ", ".join(s.name for s in alike)
        for experiment in ("optimizers", "recipes", "runs"):
            parts = [suite.of(experiment) for suite in alike]
            found.append(_table(f"{named}: {experiment}", parts))
        for size in dict.fromkeys(size for suite in alike for size in suite.sizes):
            parts = [suite.of_size(size) for suite in alike]
            found.append(_table(f"{named}: {size:.2g}M parameters", parts))
    return found


def _table(title: str, parts: Sequence[Sequence[Trained]]) -> Table | None:
    """Returns the table of runs that are alike except for their lengths.

    Args:
        title: beginning of its title.
        parts: the runs; best learning rates are chosen within one part and length.
    """
    by_test = tested(run for runs in parts for run in runs if run.finished)
    ends: dict[str, dict[int, float]] = {}
    for runs in parts:
        for label, length in itertools.product(labels(runs), {run.iterations for run in runs}):
            if final := finalists([run for run in runs if run.iterations == length], label):
                mean = statistics.fmean(losses(final, by_test))
                ends.setdefault(label, {})[length] = mean
    reference = adamw_label(run for runs in parts for run in runs if run.label in ends)
    lengths = sorted({n for label in ends.values() for n in label})
    if reference is None or len(lengths) < 2 or len(ends) < 2:
        return None
    first = ends.pop(reference)
    rows = [[reference, *(f"{first[n]:.4f}" if n in first else NOTHING for n in lengths)]]
    for label, own in ends.items():
        times = {n: f"{loss:.4f} ({_ratio(loss, n, first)})" for n, loss in own.items()}
        rows.append([label, *(times.get(n, NOTHING) for n in lengths)])
    return Table(
        f"{title}, final loss and the steps of {reference} to the same loss",
        ["run", *(f"{n:,} iterations" for n in lengths)],
        rows,
        f"In brackets: the steps in which {reference} reaches that loss, divided by the "
        "run's own. Every length has a complete schedule; between lengths, the logarithm "
        "of the steps is interpolated.",
    )


def _ratio(loss: float, steps: int, reference: Mapping[int, float]) -> str:
    """Returns the reference's steps to a loss, divided by ``steps``; or a bound of them."""
    known = sorted(reference.items())
    if loss < known[-1][1]:
        return f"> {known[-1][0] / steps:.2f}"
    if loss > known[0][1]:
        return f"< {known[0][0] / steps:.2f}"
    for (n1, y1), (n2, y2) in itertools.pairwise(known):
        if y2 <= loss <= y1:
            share = (y1 - loss) / (y1 - y2) if y1 > y2 else 0.0
            return f"{math.exp(math.log(n1) + share * math.log(n2 / n1)) / steps:.2f}"
    return f"{known[-1][0] / steps:.2f}"
