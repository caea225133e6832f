"""Tables of the experiments that vary p and beta, or provoke what a good run has not."""

import math
import statistics

from megatron_s3.report.compare import NOTHING, Table, finalists, labels, mean
from megatron_s3.report.disturbed import BACK, pairs, recovery
from megatron_s3.report.runs import Suite, Trained

__all__ = ["PROVOKED", "tables"]

#: Experiments that provoke spikes.
PROVOKED = ("burst", "large rates", "robustness")


def tables(suite: Suite) -> list[Table | None]:
    """Returns the tables; without runs of its experiment, one is None or has no rows."""
    return [_grid(suite), _large(suite), _burst(suite), _robustness(suite)]


def _grid(suite: Suite) -> Table | None:
    """Returns the paper's figure 9 as a table."""
    runs = {(run.tags["p"], run.tags["beta"]): run for run in suite.of("grid")}
    if not runs:
        return None
    betas = sorted({beta for _, beta in runs})
    return Table(
        f"{suite.name}: S3, final validation loss by p and beta, learning rate "
        f"{next(iter(runs.values())).lr:g}",
        ["p", *(f"beta {beta:g}" for beta in betas)],
        [
            [f"{p:g}", *(_loss(runs.get((p, beta))) for beta in betas)]
            for p in sorted({p for p, _ in runs})
        ],
        "One seed.",
    )


def _large(suite: Suite) -> Table:
    runs = suite.of("large rates")
    times = sorted({run.tags["times"] for run in runs})
    rows = []
    for label in labels(runs):
        own = {run.tags["times"]: run for run in runs if run.label == label}
        seed = next(iter(own.values())).seed
        usual = {run.seed: run for run in finalists(suite.of("optimizers"), label)}
        losses = map(_loss, [usual.get(seed), *map(own.get, times)])
        spikes = (str(len(own[t].spikes)) if t in own else NOTHING for t in times)
        rows.append([label, *losses, *spikes])
    return Table(
        f"{suite.name}: final validation loss at learning rates that are too large",
        [
            "run",
            "best learning rate",
            *(f"x {t:g}" for t in times),
            *(f"spikes at x {t:g}" for t in times),
        ],
        rows,
        "One seed.",
    )


def _burst(suite: Suite) -> Table:
    runs = [run for run in suite.of("burst") if run.finished]
    rows = []
    for label in labels(runs):
        own = {run.tags["burst"]: run for run in runs if run.label == label}
        if len(own) != 2:
            continue
        without, burst = own[min(own)], own[max(own)]
        rows.append([label, f"{without.final:.4f}", f"{burst.final:.4f}",
                     mean([burst.final - without.final], 4), *_excursion(without, burst),
                     str(len(burst.spikes))])  # fmt: skip
    times = max((run.tags["burst"] for run in runs), default=1)
    return Table(
        f"{suite.name}: one gradient {times:g} times too large, in the middle of the run",
        ["run", "loss without it", "loss with it", "difference", "rise", "iterations to recover",
         "spikes found"],
        rows,
        "Rise is the largest difference to the training loss of the run without it, on the same "
        "samples. A run has recovered when the median of 5 logged losses is within 0.05 nats of "
        "that run's. One seed.",
    )  # fmt: skip


def _robustness(suite: Suite) -> Table:
    """Returns what disturbances do, each compared with the run of its seed without one."""
    runs = [run for run in suite.of("robustness") if run.finished]
    found = pairs(runs)
    rows = []
    for label in labels(runs):
        for name, by_label in found.items():
            own = by_label.get(label)
            if not own:
                continue
            effects = [recovery(*pair) for pair in own]
            rows.append([
                f"{label}: {name}",
                f"{statistics.fmean(without.final for without, _ in own):.4f}",
                mean([one.end for one in effects], 4),
                mean([one.rise for one in effects], 2),
                ", ".join("never" if one.back is None else str(one.back) for one in effects),
                mean([one.area for one in effects], 1),
                str(len(effects)),
            ])  # fmt: skip
    return Table(
        f"{suite.name}: disturbances in the middle of the run",
        ["run", "loss without it", "difference at the end", "rise", "iterations to recover",
         "area", "seeds"],
        rows,
        "Differences are to the run without the disturbance, on the same samples. Rise is the "
        "largest mean of 10 of them, area the sum of all after the disturbance (nats x "
        "iterations). A run has recovered when, after the rise, the mean of 20 is at most "
        f"{BACK:g} nats; each seed's number is given.",
    )  # fmt: skip


def _excursion(without: Trained, burst: Trained) -> tuple[str, str]:
    """Returns how far a run rises above another one, and the iterations until it has recovered."""
    gap = [(i, b - a) for (i, a), (_, b) in zip(without.loss, burst.loss, strict=False)]
    begin = next((i for i, d in gap if d != 0), None)
    if begin is None:
        return "0.000", "0"
    if not all(math.isfinite(d) for _, d in gap):
        return "diverged", "not in this run"
    smooth = [
        (i, statistics.median(d for _, d in gap[max(0, k - 2) : k + 3]))
        for k, (i, _) in enumerate(gap)
    ]
    rise = max(d for i, d in gap if i >= begin)
    if rise <= 0.05:
        return f"{rise:.3f}", "0"
    peak = -max((d, -i) for i, d in smooth if i >= begin)[1]
    back = next((i for i, d in smooth if i >= peak and d <= 0.05), None)
    return f"{rise:.3f}", "not in this run" if back is None else str(back - begin)


def _loss(run: Trained | None) -> str:
    """Returns the final validation loss of a run that has finished."""
    return f"{run.final:.4f}" if run is not None and run.finished else NOTHING
