"""Tables that compare runs. Losses are in nats per token."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_s3.report.disturbed import BACK, recovery
from megatron_s3.report.runs import Suite, Trained
from megatron_s3.telemetry.detectors import DETECTORS

__all__ = ["Table", "about", "best_rate", "difference", "finalists", "named_disturbance", "tables"]

NOTHING = "-"
#: The optimizers with which others are compared; the last one is the paper's own.  Descriptions of
#: optimizers are not imported, because they import torch.
REFERENCE, OWN = AGAINST = ("adamw", "s3")
#: Experiments that provoke spikes.
PROVOKED = ("burst", "large rates", "robustness")
#: Published spike scores: a heading, and the detector that flags a loss.
SCORES = {
    "OLMo-core score": "mean + 6 sigma of 128 (OLMo-core)",
    "OLMo 2 score": "mean + 7 sigma of 1,000 (OLMo 2)",
}


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: title, one line.
        headings: headings of the columns.
        rows: cells of each row, as many as headings.
        note: sentences below the table.
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
    """Returns lines with aligned columns: the first one to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]


def about(suite: Suite, experiment: str = "") -> str:
    """Returns the beginning of a title: suite and experiment; nothing for runs of no suite."""
    named = [name for name in (suite.name, experiment) if name and name != "runs"]
    return f"{', '.join(named)}: " if named else ""


def labels(runs: Iterable[Trained]) -> list[str]:
    """Returns the labels of the runs: S3's first, the others in the order of the runs."""
    found = {run.label: run.optimizer for run in runs}
    return sorted(found, key=lambda label: (found[label] != OWN, label.lower() != OWN))


def best_rate(runs: Iterable[Trained], label: str) -> float:
    """Returns the learning rate with the lowest final loss; NaN if no run has finished.

    The runs of one seed are compared: the seed with the most learning rates.
    """
    own = [run for run in runs if run.label == label and run.finished]
    if not own:
        return math.nan
    seeds = {run.seed: len({r.lr for r in own if r.seed == run.seed}) for run in own}
    most = min(seed for seed, count in seeds.items() if count == max(seeds.values()))
    return min((run for run in own if run.seed == most), key=lambda run: run.final).lr


def finalists(runs: Sequence[Trained], label: str) -> list[Trained]:
    """Returns the finished runs of a label at its best learning rate, sorted by seed."""
    rate = best_rate(runs, label)
    own = [run for run in runs if run.label == label and run.finished and run.lr == rate]
    return sorted(own, key=lambda run: run.seed)


def tables(suites: Sequence[Suite], peak_tflops: float | None = None) -> list[Table]:
    """Returns all tables of the runs.

    Args:
        suites: the runs.
        peak_tflops: peak of one device in the precision of the training, for the MFU.
    """
    found = []
    for suite in suites:
        for experiment in suite.compared:
            if table := _final(suite, experiment, suite.of(experiment)):
                found.append(table)
        found += [
            t
            for t in (
                _grid(suite),
                _large(suite),
                _burst(suite),
                _robustness(suite),
                _spikes(suite),
            )
            if t
        ]
        found += [t for t in [_speed(suite, peak_tflops)] if t]
    return [*found, *_equal_steps(suites), *_running(suites)]


def _final(suite: Suite, experiment: str, runs: Sequence[Trained]) -> Table | None:
    """Returns the paper's tables II and IV; None if no run has finished."""
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
        losses = [run.reported for run in final]
        rates = sorted({run.lr for run in runs if run.label == label})
        largest = [
            max(v for _, v in run.update("max_abs")) for run in final if run.update("max_abs")
        ]
        mean = f"{statistics.fmean(losses):.4f}"
        row = [label, f"{final[0].lr:g}", _between(rates), mean, _spread(losses)]
        row += [difference(final, other) for other in against.values()]
        row += [f"{max(largest):.3f}" if largest else NOTHING]
        row += [NOTHING if final[0].bound is None else f"{final[0].bound:.4g}"]
        rows.append((statistics.fmean(losses), [*row, str(len(final))]))
    if not rows:
        return None
    rows.sort(key=lambda row: row[0])
    heads = ["run", "learning rate", "learning rates tried", "loss", "s.d.",
             *(f"loss minus that of {label}" for label in against),
             "largest |u|", "bound of |u|", "seeds"]  # fmt: skip
    cells = [row for _, row in rows]
    chosen = any(row[2] != "1" for row in cells)
    differ = any(cell != NOTHING for row in cells for cell in row[5 : 5 + len(against)])
    several = any(row[-1] != "1" for row in cells)
    if not chosen:
        heads, cells = _without(heads, cells, "learning rates tried")
    lengths = {run.iterations for run in runs if run.finished}
    upto = "up to " if len(lengths) > 1 else ""
    notes = ["Losses are in nats per token" + ("; the lowest comes first." if rows[1:] else ".")]
    if differ:
        notes.append(
            "Differences are taken seed by seed"
            + (", with their mean and standard deviation (s.d.)." if several else ".")
        )
    tested = any(run.reported != run.final for run in runs if run.finished)
    if chosen:
        notes.append(
            "The learning rate of each row is the best of those that were tried; it was chosen on "
            + (
                "validation data that are not the test data."
                if tested
                else "the same validation data."
            )
        )
    heads, cells = _filled(heads, cells)
    if any("|u|" in head for head in heads):
        notes.append("|u| is the absolute value of an update divided by the learning rate.")
    kind = "test" if tested else "validation"
    return Table(
        f"{about(suite, experiment)}final {kind} loss after {upto}{max(lengths):,} iterations",
        heads,
        cells,
        " ".join(notes),
    )


def _without(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *left_out: str
) -> tuple[list[str], list[list[str]]]:
    """Returns headings and rows without some columns."""
    kept = [k for k, head in enumerate(heads) if head not in left_out]
    return [heads[k] for k in kept], [[row[k] for k in kept] for row in rows]


def _filled(
    heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Returns headings and rows without columns in which no row has a value."""
    empty = [head for k, head in enumerate(heads) if all(row[k] == NOTHING for row in rows)]
    return _without(heads, rows, *empty)


def _optimizer(runs: Sequence[Trained], label: str) -> str:
    return next(run.optimizer for run in runs if run.label == label)


def _between(rates: Sequence[float]) -> str:
    if len(rates) == 1:
        return "1"
    return f"{len(rates)}, {rates[0]:g} to {rates[-1]:g}"


def _spread(values: Sequence[float]) -> str:
    finite = all(map(math.isfinite, values))
    return f"{statistics.stdev(values):.4f}" if len(values) > 1 and finite else NOTHING


def difference(runs: Sequence[Trained], others: Sequence[Trained]) -> str:
    """Returns the mean and the standard deviation of differences of final losses, seed by seed."""
    by_seed = {run.seed: run.reported for run in others}
    found = [run.reported - by_seed[run.seed] for run in runs if run.seed in by_seed]
    if not found or list(runs) == list(others):
        return NOTHING
    if not all(map(math.isfinite, found)):
        return "diverged"
    spread = f" +- {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):+.3f}{spread}"


def _grid(suite: Suite) -> Table | None:
    """Returns the paper's figure 9 as a table."""
    cells = {(run.tags["p"], run.tags["beta"]): run.final for run in suite.of("grid")}
    if not cells:
        return None
    betas = sorted({beta for _, beta in cells})
    return Table(
        f"{suite.name}: S3, final validation loss by p and beta, learning rate "
        f"{suite.of('grid')[0].lr:g}",
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
        ["run", "loss without it", "loss with it", "difference", "rise", "iterations to recover",
         "spikes found"],
        rows,
        "Rise is the largest difference to the training loss of the run without it, on the same "
        "samples. A run has recovered when the median of 5 logged losses is within 0.05 nats of "
        "that run's. One seed.",
    )  # fmt: skip


def _robustness(suite: Suite) -> Table | None:
    """Returns what disturbances do, each compared with the run of its seed without one."""

    def key(run: Trained) -> tuple[int, float]:
        return run.seed, run.tags.get("ranks", 1)

    runs = [run for run in suite.of("robustness") if run.finished]
    rows = []
    for label in labels(runs):
        own = [run for run in runs if run.label == label]
        calm = {key(run): run for run in own if named_disturbance(run) == ""}
        for name in dict.fromkeys(map(named_disturbance, own)):
            pairs = [(calm[key(r)], r) for r in own
                     if name and named_disturbance(r) == name and key(r) in calm]  # fmt: skip
            found = [recovery(*pair) for pair in pairs]
            if not found:
                continue
            back = ["never" if one.back is None else str(one.back) for one in found]
            final = statistics.fmean(without.final for without, _ in pairs)
            row = [f"{label}: {name}", f"{final:.4f}"]
            row += [_mean([one.end for one in found], 4), _mean([one.rise for one in found], 2)]
            row += [", ".join(back), _mean([one.area for one in found], 1), str(len(found))]
            rows.append(row)
    if not rows:
        return None
    return Table(
        f"{suite.name}: disturbances in the middle of the run",
        [
            "run",
            "loss without it",
            "difference at the end",
            "rise",
            "iterations to recover",
            "area",
            "seeds",
        ],
        rows,
        "Differences are to the run without the disturbance, on the same samples. Rise is the "
        "largest mean of 10 of them, area the sum of all after the disturbance (nats x "
        "iterations). A run has recovered when, after the rise, the mean of 20 is at most "
        f"{BACK:g} nats; each seed's number is given.",
    )


def named_disturbance(run: Trained) -> str:
    """Returns what disturbs a run of the experiment "robustness"; empty for nothing."""
    burst, ranks = run.tags.get("burst", 1.0), run.tags.get("ranks", 1)
    parts = []
    if burst != 1:
        parts.append(f"gradient{f' of 1 of {ranks:g} ranks' if ranks > 1 else ''} x {burst:g}")
    for tag, words in (("corrupted", "corrupted batches"), ("cpp", "batches of C++")):
        if count := run.tags.get(tag):
            parts.append(f"{count:g} {words}")
    return ", ".join(parts)


def _mean(values: Sequence[float], digits: int) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged"
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.{digits}f}{spread}"


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
    """Returns the loss spikes per 10,000 iterations of all runs in which none was provoked."""
    runs = [run for run in suite.runs if run.experiment not in PROVOKED]
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
    interval = max(every, default=1)
    notes = []
    if len({run.lr for run in runs}) > 1:
        notes.append("Runs at all learning rates are counted.")
    if interval > 1:
        notes.append(f"A loss is logged every {interval} iterations; shorter spikes may be missed.")
    notes.append(
        "A score is the percentage of logged losses that are more than 6 standard deviations above "
        "the mean of the 128 before (OLMo-core), or more than 7 above that of 1,000 (OLMo 2)."
    )
    return Table(
        f"{about(suite)}loss spikes",
        ["optimizer", "spikes per 10,000 iterations", "spikes", "iterations", "runs", *SCORES],
        rows,
        " ".join(notes),
    )


def _spike_score(runs: Sequence[Trained], rule: str) -> str:
    """Returns the percentage of the runs' losses that a detector flags."""
    flags = [f for run in runs for f in DETECTORS[rule]([loss for _, loss in run.loss])]
    return f"{100 * statistics.fmean(flags):.2f}" if flags else NOTHING


def _speed(suite: Suite, peak_tflops: float | None) -> Table | None:
    """Returns the time of an iteration, and the model's FLOP/s."""
    rows = []
    for label, size in dict.fromkeys((run.label, run.tags.get("million")) for run in suite.runs):
        own = [run for run in suite.runs if (run.label, run.tags.get("million")) == (label, size)]
        own = [run for run in own if math.isfinite(run.seconds)]
        if not own:
            continue
        seconds = statistics.median(run.seconds for run in own)
        start = own[0].start
        ranks = start["world_size"]
        tokens = start["global_batch_size"] * start["seq_length"]
        flops = start.get("flops")
        each = math.nan if flops is None else flops / seconds / ranks / 1e12
        named = label if size is None else f"{label}, {size:.2g}M"
        row = [named, f"{1e3 * seconds:,.1f}", f"{tokens / seconds:,.0f}", str(ranks)]
        row += [NOTHING if math.isnan(each) else f"{each:.3g}"]
        if peak_tflops is not None:
            row += [NOTHING if math.isnan(each) else f"{100 * each / peak_tflops:.1f}"]
        rows.append([*row, str(len(own))])
    if not rows:
        return None
    mfu = [] if peak_tflops is None else [f"MFU, % of {peak_tflops:g}"]
    return Table(
        f"{about(suite)}speed",
        ["run", "ms per iteration", "tokens per second", "ranks", "TFLOP/s per rank", *mfu, "runs"],
        rows,
        "Medians of the logged intervals, without evaluations; Megatron counts the model's FLOPs. "
        "A run that shares its machine with other programs is slower.",
    )


def _equal_steps(suites: Sequence[Suite]) -> list[Table]:
    """Returns tables of the steps that AdamW needs for the losses that others reach."""
    found = []
    for model in dict.fromkeys(suite.model for suite in suites):
        alike = sorted((s for s in suites if s.model == model), key=lambda s: s.iterations)
        named = ", ".join(s.name for s in alike)
        for experiment in ("optimizers", "recipes", "runs"):
            parts = [suite.of(experiment) for suite in alike]
            found.append(_equal_steps_of(f"{named}: {experiment}", parts))
        for size in dict.fromkeys(size for suite in alike for size in suite.sizes):
            parts = [suite.of_size(size) for suite in alike]
            found.append(_equal_steps_of(f"{named}: {size:.2g}M parameters", parts))
    return [table for table in found if table]


def _equal_steps_of(title: str, parts: Sequence[Sequence[Trained]]) -> Table | None:
    """Returns the table of runs that are alike except for their lengths.

    Args:
        title: beginning of its title.
        parts: the runs; best learning rates are chosen within one part and length.
    """
    ends: dict[str, dict[int, float]] = {}
    names = {}
    for runs in parts:
        for label in labels(runs):
            for length in {run.iterations for run in runs if run.label == label}:
                final = finalists([r for r in runs if r.iterations == length], label)
                if final:
                    mean = statistics.fmean(run.reported for run in final)
                    ends.setdefault(label, {})[length] = mean
                    names[label] = final[0].optimizer
    reference = next((label for label in ends if names[label] == REFERENCE), None)
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
    return (
        [Table("Runs that are not finished", ["folder", "iterations", "training loss"], rows)]
        if rows
        else []
    )
