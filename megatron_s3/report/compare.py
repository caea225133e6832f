"""Tables that compare runs. Losses are in nats per token."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_s3.report.disturbed import BACK, pairs, recovery
from megatron_s3.report.runs import Suite, Trained
from megatron_s3.telemetry.detectors import OLMO2, OLMO_CORE, deviations

__all__ = ["Table", "about", "adamw_label", "best_rate", "difference", "finalists", "gaps"]
__all__ += ["labels", "tables"]

NOTHING = "-"
#: The optimizers with which others are compared, by the names of --optimizer: AdamW, the plugin's
#: and Megatron's own, and the paper's.  Descriptions of optimizers are not imported, because they
#: import torch.
REFERENCE, OWN = AGAINST = (("adamw", "adam"), ("s3",))
#: Experiments that provoke spikes.
PROVOKED = ("burst", "large rates", "robustness")
#: Published spike scores by their headings.
SCORES = {"OLMo-core score": OLMO_CORE, "OLMo 2 score": OLMO2}


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
    return sorted(found, key=lambda label: (found[label] not in OWN, label.lower() not in OWN))


def _label(runs: Iterable[Trained], optimizers: Sequence[str]) -> str | None:
    """Returns the shortest label of some optimizers, which names no settings; None without one."""
    return min((run.label for run in runs if run.optimizer in optimizers), key=len, default=None)


def adamw_label(runs: Iterable[Trained]) -> str | None:
    """Returns the label of AdamW."""
    return _label(runs, REFERENCE)


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
    own = [run for run in runs if run.label == label and run.finished]
    own = [run for run in own if run.lr == rate or math.isnan(rate)]  # unknown
    return sorted(own, key=lambda run: run.seed)


def tables(suites: Sequence[Suite], peak_tflops: float | None = None) -> list[Table]:
    """Returns all tables of the runs that have rows.

    Args:
        suites: the runs.
        peak_tflops: peak of one device in the precision of the training, for the MFU.
    """
    found: list[Table | None] = []
    for suite in suites:
        found += [_final(suite, experiment, runs) for experiment, runs in suite.compared.items()]
        found += [_grid(suite), _large(suite), _burst(suite), _robustness(suite), _spikes(suite)]
        found.append(_speed(suite, peak_tflops))
    found += [*_equal_steps(suites), _running(suites)]
    return [table for table in found if table and table.rows]


def _final(suite: Suite, experiment: str, runs: Sequence[Trained]) -> Table | None:
    """Returns the paper's tables II and IV; None if no run has finished."""
    usual = suite.of("optimizers") or runs
    against = {}
    # S3 itself rather than the one that an experiment varies.
    for optimizer, places in zip(AGAINST, ((runs, usual), (usual, runs)), strict=True):
        for among in places:
            if (label := _label(among, optimizer)) is not None:
                against[f"loss minus that of {label}"] = finalists(among, label)
                break
    rows = []
    for label in labels(runs):
        final = finalists(runs, label)
        if not final:
            continue
        losses = [run.reported for run in final]
        largest = [v for run in final for _, v in run.update("max_abs")]
        row = {
            "run": label,
            "learning rate": NOTHING if math.isnan(final[0].lr) else f"{final[0].lr:g}",
            "learning rates tried": _between(sorted({r.lr for r in runs if r.label == label})),
            "loss": f"{statistics.fmean(losses):.4f}",
            "s.d.": _spread(losses),
            **{head: difference(final, others) for head, others in against.items()},
            "largest |u|": f"{max(largest):.3f}" if largest else NOTHING,
            "bound of |u|": NOTHING if final[0].bound is None else f"{final[0].bound:.4g}",
            "seeds": str(len(final)),
        }
        rows.append((statistics.fmean(losses), row))
    if not rows:
        return None
    cells = [row for _, row in sorted(rows, key=lambda row: row[0])]
    empty = {"learning rates tried": "1"}
    heads = [h for h in cells[0] if any(row[h] != empty.get(h, NOTHING) for row in cells)]
    notes = ["Losses are in nats per token" + ("; the lowest comes first." if rows[1:] else ".")]
    if not against.keys().isdisjoint(heads):
        several = any(row["seeds"] != "1" for row in cells)
        spread = ", with their mean and standard deviation (s.d.)" if several else ""
        notes.append(f"Differences are taken seed by seed{spread}.")
    finished = [run for run in runs if run.finished]
    tested = any(run.reported != run.final for run in finished)
    if "learning rates tried" in heads:
        same = "the same validation data"
        data = "validation data that are not the test data" if tested else same
        notes.append(
            "The learning rate of each row is the best of those that were tried; it was chosen on "
            f"{data}."
        )
    if any("|u|" in head for head in heads):
        notes.append("|u| is the absolute value of an update divided by the learning rate.")
    lengths = {run.iterations for run in finished}
    upto = "up to " if len(lengths) > 1 else ""
    kind = "test" if tested else "validation"
    return Table(
        f"{about(suite, experiment)}final {kind} loss after {upto}{max(lengths):,} iterations",
        heads,
        [[row[head] for head in heads] for row in cells],
        " ".join(notes),
    )


def _between(rates: Sequence[float]) -> str:
    if len(rates) == 1:
        return "1"
    return f"{len(rates)}, {rates[0]:g} to {rates[-1]:g}"


def _spread(values: Sequence[float]) -> str:
    finite = all(map(math.isfinite, values))
    return f"{statistics.stdev(values):.4f}" if len(values) > 1 and finite else NOTHING


def gaps(runs: Iterable[Trained], others: Iterable[Trained]) -> list[float]:
    """Returns the final losses of runs minus those of others with the same seeds."""
    by_seed = {run.seed: run.reported for run in others}
    return [run.reported - by_seed[run.seed] for run in runs if run.seed in by_seed]


def difference(runs: Sequence[Trained], others: Sequence[Trained]) -> str:
    """Returns the mean and the standard deviation of differences of final losses, seed by seed."""
    found = gaps(runs, others)
    return NOTHING if not found or list(runs) == list(others) else _mean(found, 3)


def _mean(values: Sequence[float], digits: int) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged"
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.{digits}f}{spread}"


def _loss(run: Trained | None) -> str:
    """Returns the final validation loss of a run that has finished."""
    return f"{run.final:.4f}" if run is not None and run.finished else NOTHING


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
                     _mean([burst.final - without.final], 4), *_excursion(without, burst),
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
                _mean([one.end for one in effects], 4),
                _mean([one.rise for one in effects], 2),
                ", ".join("never" if one.back is None else str(one.back) for one in effects),
                _mean([one.area for one in effects], 1),
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


def _spikes(suite: Suite) -> Table:
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
    interval = max(
        (b - a for run in runs for (a, _), (b, _) in itertools.pairwise(run.loss)), default=1
    )
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


def _spike_score(runs: Sequence[Trained], rule: tuple[int, float]) -> str:
    """Returns the percentage of the runs' losses that a score flags."""
    flags = [f for run in runs for f in deviations((loss for _, loss in run.loss), *rule)]
    return f"{100 * statistics.fmean(flags):.2f}" if flags else NOTHING


def _speed(suite: Suite, peak_tflops: float | None) -> Table:
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
        each = None if flops is None else flops / seconds / ranks / 1e12
        named = label if size is None else f"{label}, {size:.2g}M"
        row = [named, f"{1e3 * seconds:,.1f}", f"{tokens / seconds:,.0f}", str(ranks)]
        row.append(NOTHING if each is None else f"{each:.3g}")
        if peak_tflops is not None:
            row.append(NOTHING if each is None else f"{100 * each / peak_tflops:.1f}")
        rows.append([*row, str(len(own))])
    mfu = [] if peak_tflops is None else [f"MFU, % of {peak_tflops:g}"]
    return Table(
        f"{about(suite)}speed",
        ["run", "ms per iteration", "tokens per second", "ranks", "TFLOP/s per rank", *mfu, "runs"],
        rows,
        "Medians of the logged intervals, without evaluations; Megatron counts the model's FLOPs. "
        "A run that shares its machine with other programs is slower.",
    )


def _equal_steps(suites: Sequence[Suite]) -> list[Table | None]:
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
    return found


def _equal_steps_of(title: str, parts: Sequence[Sequence[Trained]]) -> Table | None:
    """Returns the table of runs that are alike except for their lengths.

    Args:
        title: beginning of its title.
        parts: the runs; best learning rates are chosen within one part and length.
    """
    ends: dict[str, dict[int, float]] = {}
    for runs in parts:
        for label, length in itertools.product(labels(runs), {run.iterations for run in runs}):
            if final := finalists([run for run in runs if run.iterations == length], label):
                mean = statistics.fmean(run.reported for run in final)
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


def _running(suites: Sequence[Suite]) -> Table:
    rows = []
    for run in (run for suite in suites for run in suite.runs if not run.finished):
        whole = f" of {run.iterations:,}" if run.start["train_iters"] else ""
        loss = f"{run.loss[-1][1]:.4f}" if run.loss else NOTHING
        rows.append([str(run.folder), f"{run.reached:,}{whole}", loss])
    return Table("Runs that are not finished", ["folder", "iterations", "training loss"], rows)
