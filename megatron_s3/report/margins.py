"""Final losses minus AdamW's by the length of the runs, and where they go."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_s3.report.compare import Table, adamw_label, finalists, gaps, labels
from megatron_s3.report.runs import Suite

__all__ = ["MODELS", "Margins", "extrapolated", "margins", "tables"]

#: Of each label the tokens a parameter, and the differences seed by seed.
Margins = dict[str, list[tuple[float, list[float]]]]
#: How much longer than the longest run a margin is extrapolated.
FURTHER = 10
#: What a margin may be linear in: a line without an end, and one that ends at a constant.
MODELS: dict[str, Callable[[float], float]] = {
    "log(tokens)": math.log,
    "1 / sqrt(tokens)": lambda tokens: 1 / math.sqrt(tokens),
}


class Extrapolated(NamedTuple):
    """A value of a fitted line.

    Attributes:
        value: value in nats.
        error: its standard error, which knows nothing of errors of the model.
    """

    value: float
    error: float


def margins(suite: Suite, million: float, reference: str) -> Margins:
    """Returns the differences to a label, of one model and of all lengths.

    A difference is inf or NaN if one of the two runs has diverged.
    """
    runs = suite.of_size(million)
    found: Margins = {}
    for tokens in sorted({run.tags["tokens"] for run in runs}):
        own = [run for run in runs if run.tags["tokens"] == tokens]
        for label in labels(own):
            if each := gaps(finalists(own, label), finalists(own, reference)):
                found.setdefault(label, []).append((tokens, each))
    return found


def extrapolated(
    points: Sequence[tuple[float, Sequence[float]]], model: str, tokens: float
) -> Extrapolated | None:
    """Returns the value at a length of the line that fits the differences best.

    It is an ordinary regression with a point for each seed.

    Args:
        points: lengths in tokens a parameter, and the differences at each.
        model: a key of :data:`MODELS`.
        tokens: length of the value.

    Returns:
        None if there are fewer than three lengths, or fewer than four points; NaN if a difference
        is not finite.
    """
    pairs = [(MODELS[model](at), gap) for at, each in points for gap in each]
    if len(points) < 3 or len(pairs) < 4:
        return None
    if not all(math.isfinite(gap) for _, gap in pairs):
        return Extrapolated(math.nan, math.nan)
    xs = [x for x, _ in pairs]
    slope, constant = statistics.linear_regression(xs, [y for _, y in pairs])
    count, middle = len(pairs), statistics.fmean(xs)
    variance = sum((y - constant - slope * x) ** 2 for x, y in pairs) / (count - 2)
    spread = sum((x - middle) ** 2 for x in xs)
    x = MODELS[model](tokens)
    error = math.sqrt(variance * (1 / count + (x - middle) ** 2 / spread))
    return Extrapolated(constant + slope * x, error)


def tables(suites: Sequence[Suite]) -> list[Table]:
    """Returns a table for each model that was trained at three lengths or more."""
    found = [_table(suite, million) for suite in suites for million in suite.sizes]
    return [table for table in found if table]


def _cell(end: Extrapolated) -> str:
    return "diverged" if math.isnan(end.value) else f"{end.value:+.3f} +- {end.error:.3f}"


def _table(suite: Suite, million: float) -> Table | None:
    against = adamw_label(suite.of_size(million))
    if against is None:
        return None
    found = margins(suite, million, against)
    shown = {
        label: points
        for label, points in found.items()
        if label != against and extrapolated(points, next(iter(MODELS)), 1)
    }
    if not shown:
        return None
    longest = max(points[-1][0] for points in shown.values())
    rows = []
    for label, points in shown.items():
        seeds = ", ".join(f"{tokens:g}: {len(each)}" for tokens, each in points)
        for model in MODELS:
            ends = [extrapolated(points, model, n * longest) for n in (1, FURTHER)]
            rows.append([label, model, *(_cell(end) for end in ends if end), seeds])
    return Table(
        f"{suite.name}, {million:.2g}M parameters: loss minus that of {against}, extrapolated",
        ["run", "linear in", f"{longest:g} tokens a parameter",
         f"{FURTHER * longest:g} tokens a parameter", "seeds by length"],
        rows,
        "An ordinary regression with a point for each seed and its standard error. Both lines "
        "are guesses: what lies between them is not known any better.",
    )  # fmt: skip
