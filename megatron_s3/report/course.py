"""Tables of the course of runs: loss spikes, speed, and which runs have not finished."""

import itertools
import math
import statistics
from collections.abc import Sequence

from megatron_s3.report.compare import NOTHING, Table, about
from megatron_s3.report.provoked import PROVOKED
from megatron_s3.report.runs import Suite, Trained
from megatron_s3.telemetry.detectors import OLMO2, OLMO_CORE, deviations

__all__ = ["running", "speed", "spikes"]

#: Published spike scores by their headings.
SCORES = {"OLMo-core score": OLMO_CORE, "OLMo 2 score": OLMO2}


def spikes(suite: Suite) -> Table:
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


def speed(suite: Suite, peak_tflops: float | None) -> Table:
    """Returns the time of an iteration, and the model's FLOP/s."""
    alike: dict[tuple[str, int, int], list[Trained]] = {}
    for run in suite.runs:
        if math.isfinite(run.seconds):
            tokens = run.start["global_batch_size"] * run.start["seq_length"]
            alike.setdefault((_named(run), run.start["world_size"], tokens), []).append(run)
    rows = []
    for (named, ranks, tokens), own in alike.items():
        seconds = statistics.median(run.seconds for run in own)
        rate = 1 / statistics.median(run.pace for run in own)
        flops = own[0].start.get("flops")
        each = None if flops is None else flops / tokens * rate / ranks / 1e12
        row = [named, f"{1e3 * seconds:,.1f}", f"{rate:,.0f}", str(ranks)]
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


def _named(run: Trained) -> str:
    """Returns the label of a run, with its size and its setting if it has them."""
    size = f"{run.tags['million']:.2g}M" if "million" in run.tags else ""
    setting = f"{run.experiment} {run.tags['setting']}" if "setting" in run.tags else ""
    return ", ".join(filter(None, (run.label, size, setting)))


def running(suites: Sequence[Suite]) -> Table:
    """Returns the runs that have not finished, and how far they are."""
    rows = []
    for run in (run for suite in suites for run in suite.runs if not run.finished):
        whole = f" of {run.iterations:,}" if run.start["train_iters"] else ""
        loss = f"{run.loss[-1][1]:.4f}" if run.loss else NOTHING
        rows.append([str(run.folder), f"{run.reached:,}{whole}", loss])
    return Table("Runs that are not finished", ["folder", "iterations", "training loss"], rows)
