"""The figures, axes and lines of which pictures are made; they are legible without colour."""

import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_s3.report.runs import Trained
from megatron_s3.report.styles import style as style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DARK", "FAINT", "OTHER", "Picture", "colour_of", "colour_unlike", "draw_band"]
__all__ += ["draw_legend", "draw_line", "extent", "spell_out", "subplots"]

DARK, OTHER, FAINT = "#222222", "#888888", "#BBBBBB"


class Picture:
    """A picture with its title.

    Attributes:
        name: name of its file, without ``.png``.
        title: description of the picture.
        figure: figure of matplotlib, with the title and the names of the axes.
    """

    def __init__(self, name: str, title: str, figure: "Figure", x: str = "", y: str = "") -> None:
        self.name = name.lower().replace(" ", "-")
        self.title = title
        self.figure = figure
        # A letter is about 0.085 inches wide; a longer title would be cut at both ends.
        width = max(20, int(figure.get_figwidth() / 0.085))
        figure.suptitle(textwrap.fill(title, width), fontsize=10)
        if x:
            figure.supxlabel(x, fontsize=9)
            figure.supylabel(y, fontsize=9)
        spell_out(figure)


def spell_out(figure: "Figure") -> None:
    """Lets dollar signs in the names of runs and models stand for themselves, and not for math."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if isinstance(text, Text) and "$" in text.get_text():  # marks at an axis come later
            text.set_parse_math(False)


def subplots(
    count: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Any, Any]:
    """Returns a figure with ``count`` axes, at most ``columns`` in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    drawn = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(rows, columns, squeeze=False, **options).flatten()
    for panel in axes[count:]:
        panel.set_visible(False)
    for panel in axes[:count]:
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return drawn, axes[:count]


def draw_line(
    panel: Any, points: Iterable[tuple[float, float]], style: Any = "-", **options: Any
) -> None:
    """Draws a line through points, if there are any; marks alone with the style "none"."""
    if xy := list(points):
        panel.plot(*zip(*xy, strict=True), linestyle=style, **options)


def draw_legend(panel: Any, size: float = 7, **options: Any) -> None:
    """Draws the legend, if a line has a label."""
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=size, frameon=False, **options)


def extent(values: Iterable[float], share: float) -> tuple[float, float] | None:
    """Returns the lowest of the finite values, and the one below which a share of them lies."""
    known = sorted(filter(math.isfinite, values))
    return (known[0], known[int(share * (len(known) - 1))]) if known else None


def draw_band(
    panel: Any,
    runs: Sequence[Trained],
    series: Callable[[Trained], Iterable[tuple[int, float]]],
    line: str,
    colour: str,
    name: str,
) -> None:
    """Draws the mean over seeds, and the range from the lowest to the highest."""
    curves = [dict(series(run)) for run in runs]
    at = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[i] for curve in curves] for i in at]
    panel.plot(
        at, [statistics.fmean(v) for v in values], line, color=colour, linewidth=1.6, label=name
    )
    if len(runs) > 1:
        ends = ([min(v) for v in values], [max(v) for v in values])
        panel.fill_between(at, *ends, color=colour, alpha=0.18, linewidth=0)


def colour_of(label: str, otherwise: str) -> str:
    """Returns the colour of a label's optimizer."""
    found = style_of(label)
    return found.colour if found else otherwise


def colour_unlike(label: str, reference: str) -> str:
    """Returns a label's colour, or a grey if it is the reference's too."""
    colour = colour_of(label, OTHER)
    return OTHER if label != reference and colour == colour_of(reference, DARK) else colour
