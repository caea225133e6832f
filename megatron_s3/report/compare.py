"""Comparison of runs as tables. Losses are nats a token."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_s3.report.runs import Suite, Trained
from megatron_s3.telemetry.detectors import DETECTORS

__all__ = ["Table", "best_rate", "finalists", "tables"]

NOTHING = "-"
#: The optimizers that the paper compares others with; the last one is its own.  A report reads
#: logs, and imports no description (and torch with it).
REFERENCE, OWN = AGAINST = ("adamw", "s3")
#: Published spike scores: a heading, and the rule that flags a loss.
SCORES = {
    "OLMo-core score": "mean + 6 sigma of 128 (OLMo-core)",
    "OLMo 2 score": "mean + 7 sigma of 1,000 (OLMo 2)",
}


@dataclass(frozen=True)
class Table:
    """Rows for people.

    Attributes:
        title: in a line.
        headings: of the columns; the first is the rows' name.
        rows: as many cells.
        note: below it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __str__(self) -> str:
        return "\n".join(
            [self.title, *aligned([self.headings, *self.rows]), *filter(None, [self.note])]
        )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]


def labels(runs: Iterable[Trained]) -> list[str]:
    """Returns the labels of the runs, S3's first, in the order in which they appear otherwise."""
    found = {run.label: run.optimizer for run in runs}
    return sorted(found, key=lambda label: (found[label] != OWN, label.lower() != OWN))


def best_rate(runs: Iterable[Trained], label: str) -> float:
    """Returns the rate with the lowest final loss, at the seed that most rates were run with.

    NaN if no run has finished.
    """
    own = [run for run in runs if run.label == label and run.finished]
    if not own:
        return math.nan
    seeds = {run.seed: len({r.lr for r in own if r.seed == run.seed}) for run in own}
    most = min(seed for seed, count in seeds.items() if count == max(seeds.values()))
    return min((run for run in own if run.seed == most), key=lambda run: run.final).lr


def finalists(runs: Sequence[Trained], label: str) -> list[Trained]:
    """Returns the finished runs of a label at its best rate, by seed."""
    rate = best_rate(runs, label)
    own = [run for run in runs if run.label == label and run.finished and run.lr == rate]
    return sorted(own, key=lambda run: run.seed)


def tables(suites: Sequence[Suite], peak_tflops: float | None = None) -> list[Table]:
    """Returns all tables that the runs give rise to.

    Args:
        suites: of runs.
        peak_tflops: of one device, in the precision trained in, for the MFU.
    """
    found = []
    for suite in suites:
        for experiment in ("optimizers", "ablations", "recipes", "runs"):
            if runs := suite.of(experiment):
                found.append(_final(suite, experiment, runs))
        found += [t for t in (_grid(suite), _large(suite), _burst(suite), _spikes(suite)) if t]
        found += [t for t in [_speed(suite, peak_tflops)] if t]
    return [*found, *_equal_steps(suites), *_running(suites)]


def _final(suite: Suite, experiment: str, runs: Sequence[Trained]) -> Table:
    """Tables II and IV."""
    against = {}
    for optimizer in AGAINST:
        of = [x for x in labels(runs) if _optimizer(runs, x) == optimizer]
        if not of or optimizer == OWN:  # S3 itself rather than the one that is varied
            runs_of = suite.of("optimizers") or runs
            of = [x for x in labels(runs_of) if _optimizer(runs_of, x) == optimizer] or of
        else:
            runs_of = runs
        if of:
            label = min(of, key=len)
            against[label] = finalists(runs_of, label)
    rows = []
    for label in labels(runs):
        final = finalists(runs, label)
        if not final:
            continue
        losses = [run.final for run in final]
        rates = sorted({run.lr for run in runs if run.label == label})
        largest = [
            max(v for _, v in run.update("max_abs")) for run in final if run.update("max_abs")
        ]
        mean = f"{statistics.fmean(losses):.4f}"
        row = [label, f"{final[0].lr:g}", _between(rates), mean, _spread(losses)]
        row += [_difference(final, other) for other in against.values()]
        row += [f"{max(largest):.3f}" if largest else NOTHING]
        row += [NOTHING if final[0].bound is None else f"{final[0].bound:.4g}"]
        rows.append((statistics.fmean(losses), [*row, str(len(final))]))
    rows.sort(key=lambda row: row[0])
    return Table(
        f"{suite.name}: {experiment}, final validation loss after {suite.iterations:,} iterations",
        ["", "rate", "tried", "loss", "s.d.", *(f"- {label}" for label in against),
         "max |u|", "bound", "seeds"],
        [row for _, row in rows],
        "Nats a token, lowest first; differences seed by seed, with their standard deviation. The "
        "rates were chosen on the same validation data.",
    )  # fmt: skip


def _optimizer(runs: Sequence[Trained], label: str) -> str:
    return next(run.optimizer for run in runs if run.label == label)


def _between(rates: Sequence[float]) -> str:
    if len(rates) == 1:
        return "1"
    return f"{len(rates)}, {rates[0]:g} to {rates[-1]:g}"


def _spread(values: Sequence[float]) -> str:
    finite = all(map(math.isfinite, values))
    return f"{statistics.stdev(values):.4f}" if len(values) > 1 and finite else NOTHING


def _difference(runs: Sequence[Trained], others: Sequence[Trained]) -> str:
    by_seed = {run.seed: run.final for run in others}
    found = [run.final - by_seed[run.seed] for run in runs if run.seed in by_seed]
    if not found or list(runs) == list(others):
        return NOTHING
    if not all(map(math.isfinite, found)):
        return "diverged"
    spread = f" +- {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):+.3f}{spread}"


def _grid(suite: Suite) -> Table | None:
    """Figure 9."""
    cells = {(run.tags["p"], run.tags["beta"]): run.final for run in suite.of("grid")}
    if not cells:
        return None
    betas = sorted({beta for _, beta in cells})
    return Table(
        f"{suite.name}: S3, final validation loss by p and beta, rate {suite.of('grid')[0].lr:g}",
        ["p", *(f"beta {beta:g}" for beta in betas)],
        [
            [f"{p:g}", *(f"{cells.get((p, beta), math.nan):.4f}" for beta in betas)]
            for p in sorted({p for p, _ in cells})
        ],
        "One seed.",
    )


def _large(suite: Suite) -> Table | None:
    runs = suite.of("large rates")
    if not runs:
        return None
    times = sorted({run.tags["times"] for run in runs})
    rows = []
    for label in labels(runs):
        own = {run.tags["times"]: run for run in runs if run.label == label}
        first = finalists(suite.of("optimizers"), label)
        of_first = [run for run in first if own and run.seed == next(iter(own.values())).seed]
        cells = [of_first[0].final if of_first else math.nan]
        cells += [own[t].final if t in own else math.nan for t in times]
        spikes = [str(len(own[t].spikes)) if t in own else NOTHING for t in times]
        rows.append([label, *(f"{cell:.4f}" for cell in cells), *spikes])
    return Table(
        f"{suite.name}: rates too large, final validation loss",
        ["", "best rate", *(f"x {t:g}" for t in times), *(f"spikes, x {t:g}" for t in times)],
        rows,
        "One seed.",
    )


def _burst(suite: Suite) -> Table | None:
    runs = suite.of("burst")
    if not runs:
        return None
    rows = []
    for label in labels(runs):
        own = {run.tags["burst"]: run for run in runs if run.label == label}
        if len(own) != 2:
            continue
        without, burst = own[min(own)], own[max(own)]
        rise, back = _excursion(without, burst)
        rows.append([label, f"{without.final:.4f}", f"{burst.final:.4f}",
                     f"{burst.final - without.final:+.4f}", f"{rise:.3f}", back,
                     str(len(burst.spikes))])  # fmt: skip
    if not rows:
        return None
    times = max(run.tags["burst"] for run in runs)
    return Table(
        f"{suite.name}: one gradient {times:g} times too large, in the middle of the run",
        ["", "without", "with", "difference", "rise", "iterations to be back", "spikes found"],
        rows,
        "Rise: the most that the training loss is above that of the run without, on the same "
        "samples; back: within 0.05 nats of it, the median of 5 logged losses. One seed.",
    )


def _excursion(without: Trained, burst: Trained) -> tuple[float, str]:
    pairs = [(i, b - a) for (i, a), (_, b) in zip(without.loss, burst.loss, strict=False)]
    begin = next((i for i, d in pairs if d != 0), None)
    if begin is None:
        return 0.0, "0"
    smooth = [
        (pairs[k][0], statistics.median(d for _, d in pairs[max(0, k - 2) : k + 3]))
        for k in range(len(pairs))
    ]
    rise = max(d for i, d in pairs if i >= begin)
    peak = max((d, -i) for i, d in smooth if i >= begin)[1] * -1
    back = next((i for i, d in smooth if i >= peak and d <= 0.05), None)
    if rise <= 0.05:
        return rise, "0"
    return rise, "not in this run" if back is None else str(back - begin)


def _spikes(suite: Suite) -> Table | None:
    """Loss spikes in 10,000 iterations of all runs in which none was provoked."""
    runs = [run for run in suite.runs if run.experiment not in ("burst", "large rates")]
    rows = []
    for optimizer in dict.fromkeys(run.optimizer for run in runs):
        own = [run for run in runs if run.optimizer == optimizer]
        iterations = sum(run.reached for run in own)
        count = sum(len(run.spikes) for run in own)
        if iterations:
            each = [f"{1e4 * count / iterations:.2f}", str(count), f"{iterations:,}", str(len(own))]
            rows.append([optimizer, *each, *(_spike_score(own, rule) for rule in SCORES.values())])
    every = {b - a for run in runs for (a, _), (b, _) in pairwise(run.loss)}
    if not rows:
        return None
    return Table(
        f"{suite.name}: loss spikes",
        ["", "in 10,000 iterations", "spikes", "iterations", "runs", *SCORES],
        rows,
        f"At all rates; a loss is logged every {max(every, default=1)} iterations, and what is "
        "shorter may be missed. Scores: logged losses, in percent, that stand 6 standard "
        "deviations above the mean of the 128 before (OLMo-core), or 7 above that of 1,000 "
        "(OLMo 2).",
    )


def _spike_score(runs: Sequence[Trained], rule: str) -> str:
    """Percentage of the runs' losses that a rule flags."""
    flags = [f for run in runs for f in DETECTORS[rule]([loss for _, loss in run.loss])]
    return f"{100 * statistics.fmean(flags):.2f}" if flags else NOTHING


def _speed(suite: Suite, peak_tflops: float | None) -> Table | None:
    """Returns what an iteration takes, and what of it is the model's arithmetic."""
    rows = []
    for label in dict.fromkeys(run.label for run in suite.runs):
        own = [run for run in suite.runs if run.label == label and math.isfinite(run.seconds)]
        if not own:
            continue
        seconds = statistics.median(run.seconds for run in own)
        start = own[0].start
        ranks = start["world_size"]
        tokens = start["global_batch_size"] * start["seq_length"]
        flops = start.get("flops")
        each = math.nan if flops is None else flops / seconds / ranks / 1e12
        row = [label, f"{1e3 * seconds:,.1f}", f"{tokens / seconds:,.0f}", str(ranks)]
        row += [NOTHING if math.isnan(each) else f"{each:.3g}"]
        if peak_tflops is not None:
            row += [NOTHING if math.isnan(each) else f"{100 * each / peak_tflops:.1f}"]
        rows.append([*row, str(len(own))])
    if not rows:
        return None
    mfu = [] if peak_tflops is None else [f"MFU, % of {peak_tflops:g}"]
    return Table(
        f"{suite.name}: speed",
        ["", "ms an iteration", "tokens a second", "ranks", "TFLOP/s a rank", *mfu, "runs"],
        rows,
        "Medians of the logged intervals, without evaluations; arithmetic of the model as Megatron "
        "counts it. Runs that shared a machine with others are slower for it.",
    )


def _equal_steps(suites: Sequence[Suite]) -> list[Table]:
    """Returns how many steps AdamW takes to what others reach, each with a schedule of its own."""
    found = []
    for model in dict.fromkeys(suite.model for suite in suites):
        alike = sorted((s for s in suites if s.model == model), key=lambda s: s.iterations)
        for experiment in ("optimizers", "recipes", "runs"):
            ends: dict[str, dict[int, float]] = {}
            names = {}
            for suite in alike:
                runs = suite.of(experiment)
                for label in labels(runs):
                    for length in {run.iterations for run in runs if run.label == label}:
                        final = finalists([r for r in runs if r.iterations == length], label)
                        if final:
                            mean = statistics.fmean(run.final for run in final)
                            ends.setdefault(label, {})[length] = mean
                            names[label] = final[0].optimizer
            reference = next((label for label in ends if names[label] == REFERENCE), None)
            lengths = sorted({n for label in ends.values() for n in label})
            if reference is None or len(lengths) < 2 or len(ends) < 2:
                continue
            first = ends.pop(reference)
            rows = [[reference, *(f"{first[n]:.4f}" if n in first else NOTHING for n in lengths)]]
            for label, own in ends.items():
                times = {n: f"{loss:.4f} = {_ratio(loss, n, first)}" for n, loss in own.items()}
                rows.append([label, *(times.get(n, NOTHING) for n in lengths)])
            named = ", ".join(s.name for s in alike)
            found.append(Table(
                f"{named}: {experiment}, final loss = so many times the steps of {reference}",
                ["", *(f"{n:,} iterations" for n in lengths)],
                rows,
                f"The steps at whose end {reference} has the same loss, each with a whole schedule "
                "of its own; between lengths interpolated on log steps.",
            ))  # fmt: skip
    return found


def _ratio(loss: float, steps: int, reference: Mapping[int, float]) -> str:
    """Steps of the reference to a loss, in units of ``steps``; a bound beyond what was run."""
    known = sorted(reference.items())
    if loss < known[-1][1]:
        return f"> {known[-1][0] / steps:.2f}"
    if loss > known[0][1]:
        return f"< {known[0][0] / steps:.2f}"
    for (n1, y1), (n2, y2) in pairwise(known):
        if y2 <= loss <= y1:
            share = (y1 - loss) / (y1 - y2) if y1 > y2 else 0.0
            return f"{math.exp(math.log(n1) + share * math.log(n2 / n1)) / steps:.2f}"
    return f"{known[-1][0] / steps:.2f}"


def _running(suites: Sequence[Suite]) -> list[Table]:
    rows = [
        [str(run.folder), f"{run.reached:,} of {run.iterations:,}", f"{run.loss[-1][1]:.4f}"]
        for suite in suites
        for run in suite.runs
        if not run.finished and run.loss
    ]
    return [Table("not finished", ["", "iterations", "training loss"], rows)] if rows else []
