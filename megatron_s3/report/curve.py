"""Loss curves of Megatron's training runs, and their final values.

Everything is read from TensorBoard files, in which each `lm loss` belongs to one iteration. In
Megatron's log, the second line after a start or a resume is the mean of two iterations.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_s3.report.errors import RunError
from megatron_s3.report.styles import Style, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN_LOSS = "lm loss"
VALID_LOSS = "lm loss validation"
LEARNING_RATE = "learning-rate"
ITERATION_TIME = "iteration-time"
BATCH_SIZE = "batch-size"
LARGEST_UPDATE = "update/max_abs"
_SEQ_LENGTH = "seq_length/text_summary"

_SMOOTHED_OVER = 25


@dataclass(frozen=True)
class Run:
    """The contents of one training run's TensorBoard files.

    Attributes:
        name: Its name in legends and tables.
        scalars: Each quantity by its tag: its values by their iterations, ascending.
        seq_length: Tokens in a sample; None if the run did not write its arguments.
    """

    name: str
    scalars: dict[str, dict[int, float]]
    seq_length: int | None = None


@dataclass(frozen=True)
class Summary:
    """The final values of a run; None for values that the run did not write.

    Attributes:
        iterations: The last iteration.
        valid_loss: The last validation loss, in nats per token.
        largest_update: The largest |u| of the run, where u is the update without the learning rate.
        tokens_per_second: Speed at the median iteration time, without evaluation and saving.
    """

    iterations: int
    valid_loss: float | None
    largest_update: float | None
    tokens_per_second: float | None


def read(folder: str | Path, name: str) -> Run:
    """Reads a run from the folder that was Megatron's `--tensorboard-dir`.

    A run that was resumed has one file for each launch. Iterations that a later launch repeated are
    read from the later one.

    Args:
        folder: The folder.
        name: A name for the run.

    Raises:
        RunError: If there is no folder, no event file in it, or no training loss.
    """
    files = sorted(Path(folder).glob("events.out.tfevents.*"))  # their names begin with the time
    if not files:
        raise RunError(f"{folder}: no TensorBoard files; train with --tensorboard-dir {folder}")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: dict[str, dict[int, float]] = {}
    seq_length = None
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        tags = events.Tags()
        launch = {t: {e.step: e.value for e in events.Scalars(t)} for t in tags["scalars"]}
        if launch.get(TRAIN_LOSS):
            start = min(launch[TRAIN_LOSS])
            values = {t: {i: v for i, v in old.items() if i < start} for t, old in values.items()}
        for tag, new in launch.items():
            values.setdefault(tag, {}).update(new)
        if _SEQ_LENGTH in tags["tensors"]:
            text = events.Tensors(_SEQ_LENGTH)[-1].tensor_proto.string_val[0].decode()
            seq_length = int(text) if text.isdecimal() else None
    if not values.get(TRAIN_LOSS):
        raise RunError(
            f"{folder}: no {TRAIN_LOSS!r} in its TensorBoard files; wait until the run has logged "
            "an iteration"
        )
    scalars = {tag: dict(sorted(series.items())) for tag, series in values.items() if series}
    return Run(name, scalars, seq_length)


def summarize(run: Run) -> Summary:
    """Returns the final values of a run."""
    train, valid, times, batch, update = (
        run.scalars.get(tag, {})
        for tag in (TRAIN_LOSS, VALID_LOSS, ITERATION_TIME, BATCH_SIZE, LARGEST_UPDATE)
    )
    speed = None
    if times and batch and run.seq_length:
        speed = _last(batch) * run.seq_length / statistics.median(times.values())
    return Summary(
        iterations=max(train),
        valid_loss=_last(valid) if valid else None,
        largest_update=max(update.values(), default=None),
        tokens_per_second=speed,
    )


def _last(series: dict[int, float]) -> float:
    return series[max(series)]


def figure(
    runs: Sequence[Run],
    title: str,
    unigram_entropy: float | None = None,
    unit: str = "nats per byte",
) -> "Figure":
    """Returns a picture of losses, learning rate and largest update over the iterations.

    Args:
        runs: At least one run.
        title: Title of the picture.
        unigram_entropy: Loss of a model that knows only the frequencies of tokens, drawn as a
            horizontal line.
        unit: Unit of the loss. Megatron's is nats per token.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with_update = any(LARGEST_UPDATE in run.scalars for run in runs)
    heights = [4, 1, 1] if with_update else [4, 1]
    drawn = Figure(figsize=(8, 3.5 + 1.2 * len(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    loss, rate = panels[0], panels[1]
    for run, style in zip(runs, styles([run.name for run in runs]), strict=True):
        _draw_loss(loss, run, style)
        for panel, tag in zip(panels[1:], (LEARNING_RATE, LARGEST_UPDATE), strict=False):
            if tag in run.scalars:
                at, values = zip(*run.scalars[tag].items(), strict=True)
                panel.plot(at, values, color=style.colour, linestyle=style.line)
    if unigram_entropy is not None:
        loss.axhline(unigram_entropy, color="black", linestyle=(0, (1, 3)), linewidth=1.5)
        loss.annotate(
            f"unigram entropy {unigram_entropy:.3f}",
            (0.99, unigram_entropy),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
        )
    loss.set_title(title)
    loss.set_ylabel(f"loss ({unit})")
    loss.legend()
    rate.set_ylabel("learning\nrate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if with_update:
        panels[2].axhline(1, color="black", linewidth=0.8, linestyle=":")
        panels[2].annotate(
            "S3's bound",
            (0.99, 1),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        panels[2].set_ylabel("largest\n|update|")
        panels[2].set_ylim(0, 1.3 * max(1, panels[2].dataLim.ymax))
    for panel in panels:
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
    panels[-1].set_xlabel("iteration")
    return drawn


def draw(
    runs: Sequence[Run], png: str | Path, title: str, unigram_entropy: float | None = None
) -> None:
    """Writes :func:`figure` to the path `png`, whose folder is created if needed."""
    Path(png).parent.mkdir(parents=True, exist_ok=True)
    figure(runs, title, unigram_entropy).savefig(png)


def _draw_loss(panel: Any, run: Run, style: Style) -> None:
    colour, line, marker, _ = style
    at, values = zip(*run.scalars[TRAIN_LOSS].items(), strict=True)
    window = min(_SMOOTHED_OVER, max(1, len(values) // 20))
    label = f"{run.name}, training" + (f" (mean of {window})" if window > 1 else "")
    panel.plot(at, values, color=colour, alpha=0.2, linewidth=0.8)
    smooth = [statistics.fmean(values[max(0, k + 1 - window) : k + 1]) for k in range(len(values))]
    panel.plot(at, smooth, color=colour, linestyle=line, linewidth=1.2, label=label)
    if VALID_LOSS in run.scalars:
        at, values = zip(*run.scalars[VALID_LOSS].items(), strict=True)
        panel.plot(
            at,
            values,
            color=colour,
            linestyle="none",
            marker=marker,
            markersize=6,
            markeredgecolor="black",
            label=f"{run.name}, validation: {values[-1]:.3f} at the end",
        )
