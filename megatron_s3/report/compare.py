"""Labels, best learning rates and differences of runs, and the table of their final losses."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_s3.report.runs import Suite, Trained

__all__ = ["Table", "about", "adamw_label", "aligned", "best_rate", "difference", "final"]
__all__ += ["finalists", "gaps", "labels", "losses", "mean", "tested"]

NOTHING = "-"
#: The optimizers with which others are compared, by the names of --optimizer: AdamW, the plugin's
#: and Megatron's own, and the paper's.  Descriptions of optimizers are not imported, because they
#: import torch.
REFERENCE, OWN = AGAINST = (("adamw", "adam"), ("s3",))


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


def final(suite: Suite, experiment: str, runs: Sequence[Trained]) -> Table | None:
    """Returns the paper's tables II and IV; None if no run has finished."""
    usual = suite.of("optimizers") or runs
    against = {}
    # S3 itself rather than the one that an experiment varies.
    for optimizer, places in zip(AGAINST, ((runs, usual), (usual, runs)), strict=True):
        for among in places:
            if (label := _label(among, optimizer)) is not None:
                against[f"loss minus that of {label}"] = finalists(among, label)
                break
    finished = [run for run in runs if run.finished]
    compared = [*finished, *(run for others in against.values() for run in others)]
    by_test = tested(compared)
    rows = []
    for label in labels(runs):
        final = finalists(runs, label)
        if not final:
            continue
        ends = losses(final, by_test)
        largest = [run.largest for run in final if run.largest is not None]
        most = math.nan if any(map(math.isnan, largest)) else max(largest, default=None)
        row = {
            "run": label,
            "learning rate": NOTHING if math.isnan(final[0].lr) else f"{final[0].lr:g}",
            "learning rates tried": _between(sorted({r.lr for r in runs if r.label == label})),
            "loss": f"{statistics.fmean(ends):.4f}",
            "s.d.": _spread(ends),
            **{head: difference(final, others, by_test) for head, others in against.items()},
            "largest |u|": NOTHING if most is None else f"{most:.3f}",
            "bound of |u|": NOTHING if final[0].bound is None else f"{final[0].bound:.4g}",
            "seeds": str(len(final)),
        }
        rows.append((statistics.fmean(ends), row))
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
    if not by_test and any(tested([run]) for run in compared):
        notes.append("Some runs have no test loss, so validation losses are compared.")
    if "learning rates tried" in heads:
        same = "the same validation data"
        data = "validation data that are not the test data" if by_test else same
        notes.append(
            "The learning rate of each row is the best of those that were tried; it was chosen on "
            f"{data}."
        )
    if any("|u|" in head for head in heads):
        notes.append("|u| is the absolute value of an update divided by the learning rate.")
    lengths = {run.iterations for run in finished}
    upto = "up to " if len(lengths) > 1 else ""
    kind = "test" if by_test else "validation"
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


def tested(runs: Iterable[Trained]) -> bool:
    """Returns whether all runs have a test loss, by which they are then compared."""
    return not any(math.isnan(run.test) for run in runs)


def losses(runs: Iterable[Trained], by_test: bool) -> list[float]:
    """Returns the final losses of runs on the test text, or on the validation text."""
    return [run.test if by_test else run.final for run in runs]


def gaps(
    runs: Sequence[Trained], others: Sequence[Trained], by_test: bool | None = None
) -> list[float]:
    """Returns the final losses of runs minus those of others with the same seeds.

    Args:
        runs: finished runs.
        others: finished runs.
        by_test: whether their test losses are compared; None for whether all have one.
    """
    by_test = tested([*runs, *others]) if by_test is None else by_test
    by_seed = dict(zip((run.seed for run in others), losses(others, by_test), strict=True))
    ends = zip(runs, losses(runs, by_test), strict=True)
    return [loss - by_seed[run.seed] for run, loss in ends if run.seed in by_seed]


def difference(
    runs: Sequence[Trained], others: Sequence[Trained], by_test: bool | None = None
) -> str:
    """Returns the mean and the standard deviation of :func:`gaps`."""
    found = gaps(runs, others, by_test)
    return NOTHING if not found or list(runs) == list(others) else mean(found, 3)


def mean(values: Sequence[float], digits: int) -> str:
    """Returns the mean of differences, with their standard deviation if there are several."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.{digits}f}{spread}"
