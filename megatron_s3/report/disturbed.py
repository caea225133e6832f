"""Recoveries from disturbances, each measured against the same run without one."""

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from megatron_s3.report.runs import Trained

__all__ = ["BACK", "Recovery", "after", "means", "pairs", "recovery"]

#: A run is back when the mean of so many differences is at most so many nats.
WINDOW, BACK = 20, 0.02
#: The rise is the largest mean of so many differences.
_PEAK = 10


class Recovery(NamedTuple):
    """The effect of a disturbance on a run.

    Attributes:
        end: final loss minus that of the undisturbed run, in nats.
        rise: largest mean of 10 differences of the training loss, in nats.
        back: iterations until the mean of 20 differences is at most 0.02 after the rise; None if it
            never is.
        area: sum of all differences, in nats times iterations.
    """

    end: float
    rise: float
    back: int | None
    area: float


def pairs(runs: Sequence[Trained]) -> dict[str, dict[str, list[tuple[Trained, Trained]]]]:
    """Returns the disturbed runs by disturbance and label.

    Each comes after the run of its seed without a disturbance; it is left out if there is none.
    """

    def key(run: Trained) -> tuple[object, ...]:
        return run.label, run.seed, run.tags.get("ranks", 1)

    calm = {key(run): run for run in runs if not _disturbance(run)}
    found: dict[str, dict[str, list[tuple[Trained, Trained]]]] = {}
    for run in runs:
        name = _disturbance(run)
        if name and key(run) in calm:
            found.setdefault(name, {}).setdefault(run.label, []).append((calm[key(run)], run))
    return found


def _disturbance(run: Trained) -> str:
    """Returns what disturbs a run of the experiment "robustness"; empty for nothing."""
    burst, ranks = run.tags.get("burst", 1.0), run.tags.get("ranks", 1)
    parts = []
    if burst != 1:
        parts.append(f"gradient{f' of 1 of {ranks:g} ranks' if ranks > 1 else ''} x {burst:g}")
    for tag, words in (("corrupted", "corrupted batches"), ("cpp", "batches of C++")):
        if count := run.tags.get(tag):
            parts.append(f"{count:g} {words}")
    return ", ".join(parts)


def after(without: Trained, disturbed: Trained) -> list[float]:
    """Returns the differences of the training loss, from the first iteration after a disturbance.

    Args:
        without: the undisturbed run; each iteration is logged.
        disturbed: the same run with a disturbance, which begins in its middle. The losses of
            replaced batches are left out.
    """
    replaced = max(disturbed.tags.get(tag, 0) for tag in ("corrupted", "cpp"))
    begin = without.iterations // 2 + max(1, round(replaced))
    calm = dict(without.loss)
    return [loss - calm[i] for i, loss in disturbed.loss if i >= begin and i in calm]


def recovery(without: Trained, disturbed: Trained) -> Recovery:
    """Returns the effect of a disturbance; NaN for the rise if the run ends with it."""
    found = after(without, disturbed)
    peaks = means(found, _PEAK)
    rise = max(peaks, default=math.nan)
    begin = peaks.index(rise) if rise > BACK else 0
    late = enumerate(means(found, WINDOW))
    return Recovery(
        disturbed.final - without.final,
        rise,
        next((k for k, mean in late if k >= begin and mean <= BACK), None),
        sum(found),
    )


def means(values: Sequence[float], width: int) -> list[float]:
    """Returns the mean of each ``width`` neighbours; of all of them if there are fewer."""
    if len(values) <= width:
        return [statistics.fmean(values)] if values else []
    sums = [0.0, *accumulate(values)]
    return [(b - a) / width for a, b in zip(sums, sums[width:], strict=False)]
