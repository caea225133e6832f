"""Timings of optimizer steps in common rounds: their ratios, a table, a picture."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_s3.report.styles import style
from tests.harness.tables import columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison", "Spread", "Timing", "figure", "paired", "phases", "spread", "table"]
__all__ += ["write_png"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class Timing:
    """The times of a candidate or of one of its phases.

    Attributes:
        key: short name, unique in a comparison; that of a phase is ``candidate/phase``.
        label: name in the table and the picture.
        kind: "adamw", "kernel", "portable" or "other" (the plugin's other optimizers), which the
            picture distinguishes; "phase" for a phase.
        bytes_per_parameter: bytes read and written, each tensor once in each phase that needs it.
        ms: milliseconds of a step, for each round in order: from an empty stream until it is done.
        host_ms: milliseconds until the last launch returned, for each round; ``ms`` on a CPU.
        device_ms: milliseconds on a stream that was busy before, for each round; ``ms`` on a CPU.
        launches: number of kernels, copies and fills that a step launches; None on a CPU.
        path: the implementation that ran.
    """

    key: str
    label: str
    kind: str
    bytes_per_parameter: float
    ms: Sequence[float]
    host_ms: Sequence[float]
    device_ms: Sequence[float]
    launches: int | None = None
    path: str = ""


@dataclass(frozen=True)
class Comparison:
    """The times of several candidates on one list of shards, in the same rounds.

    Attributes:
        shape: name of the list.
        elements: number of elements in all shards.
        shards: number of shards.
        cut_from: number of elements of the complete list, if it was truncated; else None.
        device: "cpu" or "cuda".
        threads: number of threads on the CPU; None on a GPU.
        baselines: keys of the candidates to which ratios are computed; the picture shows those to
            the first.
        copy_bytes: bytes that a copy of the large tensor reads and writes.
        copy_ms: milliseconds of this copy on the device, for each round.
        timings: each candidate, followed by its phases.
        clocks: the GPU's clocks, power, temperature and load before and after, as text.
    """

    shape: str
    elements: int
    shards: int
    cut_from: int | None
    device: str
    threads: int | None
    baselines: Sequence[str]
    copy_bytes: int
    copy_ms: Sequence[float]
    timings: Sequence[Timing] = field(default_factory=list)
    clocks: Sequence[str | None] = ()

    @property
    def copy_gb_s(self) -> float:
        """Returns the bandwidth of the copy in GB/s, counting bytes read and written."""
        return self.copy_bytes / statistics.median(self.copy_ms) / 1e6

    @property
    def title(self) -> str:
        """Returns the title of the table and the picture."""
        cut = f", cut off from {self.cut_from:,}" if self.cut_from else ""
        threads = "" if self.threads is None else f", {self.threads} thread"
        threads += "s" if self.threads and self.threads > 1 else ""
        noun = "shard" if self.shards == 1 else "shards"
        return (
            f"{self.shape}: {self.elements:,} parameters in {self.shards} {noun}{cut}; "
            f"{self.device}{threads}"
        )

    def gb_s(self, timing: Timing) -> float:
        """Returns the bandwidth in GB/s: the counted bytes by the median time on the device."""
        seconds = statistics.median(timing.device_ms) / 1e3
        return timing.bytes_per_parameter * self.elements / seconds / 1e9

    def ratio(self, timing: Timing, baseline: str | None = None) -> Spread:
        """Returns the ratio of the time to that of a baseline's step in the same round.

        Args:
            timing: one of :attr:`timings`.
            baseline: one of :attr:`baselines`; the first if None.
        """
        return paired(timing.ms, self._of(baseline or self.baselines[0]).ms)

    def floor(self, timing: Timing) -> float:
        """Returns the ratio if the bytes were moved at the bandwidth of the copy."""
        ms = timing.bytes_per_parameter * self.elements / self.copy_gb_s / 1e6
        return ms / statistics.median(self._of(self.baselines[0]).ms)

    def _of(self, key: str) -> Timing:
        return next(t for t in self.timings if t.key == key)

    def as_json(self) -> dict:
        """Returns all figures, with the times of the rounds."""
        return {
            **{name: getattr(self, name) for name in ("shape", "elements", "shards", "cut_from")},
            **{name: getattr(self, name) for name in ("device", "threads", "baselines", "clocks")},
            "copy": {"bytes": self.copy_bytes, "ms": list(self.copy_ms), "gb_s": self.copy_gb_s},
            "candidates": [
                {
                    **{name: getattr(t, name) for name in ("key", "label", "kind", "path")},
                    "bytes_per_parameter": t.bytes_per_parameter,
                    "ms": vars(spread(t.ms)),
                    "host_ms": vars(spread(t.host_ms)),
                    "device_ms": vars(spread(t.device_ms)),
                    "ratios": {key: vars(self.ratio(t, key)) for key in self.baselines},
                    "gb_s": self.gb_s(t),
                    "share_of_copy": self.gb_s(t) / self.copy_gb_s,
                    "floor_ratio": self.floor(t),
                    "launches": t.launches,
                    "rounds_ms": list(t.ms),
                    "rounds_device_ms": list(t.device_ms),
                }
                for t in self.timings
            ],
        }


def spread(values: Sequence[float]) -> Spread:
    """Returns median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Returns median and quartiles of the ratios of values from the same rounds."""
    return spread([v / b for v, b in zip(values, baseline, strict=True)])


#: Headings of the ratios to baselines, by what a baseline's key ends in.
_RATIOS = {"-unclipped": "of unclipped", "-bf16": "of bf16"}


def _heading(baseline: str) -> str:
    return next((text for end, text in _RATIOS.items() if baseline.endswith(end)), "ratio")


def _cells(comparison: Comparison, t: Timing) -> list[str]:
    ratios = [f"{comparison.ratio(t, key).median:.3f}" for key in comparison.baselines]
    times = [f"{spread(ms).median:.3f}" for ms in (t.ms, t.host_ms, t.device_ms)]
    return [*times, *ratios]


def table(comparison: Comparison) -> str:
    """Returns a table as text; phases are indented below their candidate."""
    headings = ["", "ms", "host", "device", *map(_heading, comparison.baselines)]
    rows = [[*headings, "IQR of ratio", "B/param", "GB/s", "of copy", "launches"]]
    for t in comparison.timings:
        ratio, gb_s = comparison.ratio(t), comparison.gb_s(t)
        rows.append(
            [
                f"  {t.label}" if t.kind == "phase" else t.label,
                *_cells(comparison, t),
                f"{ratio.q1:.3f}-{ratio.q3:.3f}",
                f"{t.bytes_per_parameter:g}",
                f"{gb_s:.1f}",
                f"{gb_s / comparison.copy_gb_s:.0%}",
                "n/a" if t.launches is None else str(t.launches),
            ]
        )
    lines = [comparison.title, columns(rows, right=range(1, len(rows[0])))]
    copied = comparison.copy_bytes / 1e6
    lines.append(f"copy of one tensor, {copied:,.0f} MB moved: {comparison.copy_gb_s:.1f} GB/s")
    if comparison.device == "cpu":  # with write-allocate, the copy moves 3/2 of the counted bytes
        lines[-1] += (
            "; a CPU's caches may also read what a copy overwrites, so that steps, which work in "
            "place, can exceed 100%"
        )
    else:
        lines.append(f"clocks before and after: {'; '.join(map(str, comparison.clocks))}")
    return "\n".join(lines)


def phases(comparisons: Sequence[Comparison]) -> str:
    """Returns a table of each shape's whole phase: S3's kernels beside the AdamWs."""
    headings = ["whole phase", "", "ms", "host", "device"]
    rows = [[*headings, *map(_heading, comparisons[0].baselines), "of copy"]]
    for comparison in comparisons:
        shape = comparison.shape
        for t in comparison.timings:
            if t.kind in ("adamw", "kernel"):
                share = f"{comparison.gb_s(t) / comparison.copy_gb_s:.0%}"
                rows.append([shape, t.label, *_cells(comparison, t), share])
                shape = ""
    return columns(rows, right=range(2, len(rows[0])))


#: For each kind of timing: the optimizer whose style the legend uses, and the text there.
_LEGEND = {
    "adamw": ("AdamW", "torch's AdamW: norm, clip, step, copy"),
    "kernel": ("S3", "S3, kernel: one pass"),
    "portable": ("S3", "S3, PyTorch operations"),
    "other": ("", "the plugin's other optimizers: norm, clip, one pass"),
}
_LIMIT = 1.6  # end of the axis; longer bars are truncated, with their value as text


def figure(comparisons: Sequence[Comparison], title: str) -> "Figure":
    """Returns bars of the ratio to AdamW's optimizer phase, in one panel for each comparison.

    A bar has the colour and hatch of its optimizer in all pictures.  It is white for the PyTorch
    implementation, so that bars can be distinguished without colour.  The line on a bar shows the
    interquartile range; the diamond shows the time of its bytes at the bandwidth of the copy.

    Args:
        comparisons: one or more comparisons.
        title: the title of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    counts = [sum(t.kind != "phase" for t in c.timings) for c in comparisons]
    height = 1.4 + sum(0.32 * n + 0.75 for n in counts)
    drawn = Figure(figsize=(9, height), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(
        len(comparisons), 1, squeeze=False, height_ratios=[n + 2 for n in counts]
    )
    for panel, comparison in zip(panels[:, 0], comparisons, strict=True):
        _draw(panel, comparison)
    panels[-1, 0].set_xlabel("time / time of AdamW's whole phase, same rounds (smaller is faster)")
    handles: list = [
        Patch(**_look(optimizer, kind), edgecolor="k", label=name)
        for kind, (optimizer, name) in _LEGEND.items()
        if any(t.kind == kind for c in comparisons for t in c.timings)
    ]
    handles.append(Line2D([], [], **_FLOOR, label="its bytes at the bandwidth of a copy"))
    drawn.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    drawn.suptitle(title, fontsize=11)
    return drawn


_FLOOR = {"marker": "D", "linestyle": "", "color": "white", "markeredgecolor": "k", "markersize": 6}


def _look(label: str, kind: str) -> dict[str, str]:
    """Returns a bar's colour and hatch.

    Args:
        label: a text that begins with the optimizer's name; the bar is empty if it does not.
        kind: see :class:`Timing`.
    """
    if kind == "portable":
        return {"facecolor": "white", "hatch": "////"}
    own = style(label)
    if own is None:
        return {"facecolor": "none", "hatch": ""}
    return {"facecolor": own.colour, "hatch": own.hatch}


def _draw(panel, comparison: Comparison) -> None:
    timings = [t for t in comparison.timings if t.kind != "phase"]
    for row, t in enumerate(timings):
        ratio = comparison.ratio(t)
        shown = min(ratio.median, _LIMIT)
        panel.barh(row, shown, height=0.7, edgecolor="k", linewidth=0.8, **_look(t.label, t.kind))
        end = shown
        if ratio.median < _LIMIT:
            end = min(ratio.q3, _LIMIT)
            # A black line on a white one is visible on any bar.
            for width, colour in ((3.5, "white"), (1.5, "black")):
                panel.plot((ratio.q1, end), (row, row), color=colour, linewidth=width, zorder=3)
        floor = comparison.floor(t)
        if floor < _LIMIT:
            panel.plot(floor, row, zorder=4, **_FLOOR)
            if floor > shown - 0.03:
                end = max(end, floor + 0.02)
        text = f"{ratio.median:.2f}" + (" (cut off)" if ratio.median > _LIMIT else "")
        panel.text(end + 0.015, row, text, va="center", fontsize=9)
    panel.axvline(1, color="k", linewidth=0.8, linestyle=":")
    panel.set_yticks(range(len(timings)), [t.label for t in timings], fontsize=9)
    panel.set_xlim(0, _LIMIT + 0.25)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5])
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(comparison.title, loc="left", fontsize=9)


def write_png(comparisons: Sequence[Comparison], title: str, png: str | Path) -> None:
    """Writes the picture of :func:`figure` to the path ``png``."""
    figure(comparisons, title).savefig(png)
