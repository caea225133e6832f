"""Styles of curves and bars: each optimizer has one colour, line and marker in every picture."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["Style", "style", "styles"]


class Style(NamedTuple):
    """A style that is told apart in grey too: by brightness, dashes, markers and hatches.

    Attributes:
        colour: colour of lines and bars.
        line: line style of matplotlib.
        marker: marker of single values.
        hatch: hatch of bars.
    """

    colour: str
    line: Any
    marker: str
    hatch: str


_STYLES = {
    "s3": Style("#004488", "-", "o", ""),
    "adamw": Style("#DDAA33", "--", "s", "//"),
    "nadam": Style("#BB5566", "-.", "^", ".."),
    "adan": Style("#66CCEE", ":", "D", "\\\\"),
    "lion": Style("#222222", (0, (6, 2)), "v", "xx"),
    "sgdm": Style("#999933", (0, (4, 1, 1, 1, 1, 1)), "P", "--"),
    "signsgd": Style("#AA3377", (0, (1, 3)), "X", "++"),
}
#: Styles of other labels, where a picture has many.
_SPARE = (
    Style("#44AA99", (0, (8, 2, 1, 2)), "*", "oo"),
    Style("#777777", (0, (2, 1)), "<", "||"),
)
_OTHER_NAMES = {"adam": "adamw", "sgd": "sgdm"}


def style(label: str) -> Style | None:
    """Returns the style of the optimizer that a label begins with, None if it has none.

    Args:
        label: an optimizer's name or label, or one that goes on with settings
            (``"S3, ramp"``, ``"SGD with momentum"``).
    """
    word = re.split(r"[^a-z0-9]", label.lower())[0]
    return _STYLES.get(_OTHER_NAMES.get(word, word))


def styles(labels: Sequence[str]) -> list[Style]:
    """Returns a style for each label of one picture, all different up to 81 labels."""
    found: list[Style | None] = []
    for label in labels:
        own = style(label)
        found.append(None if own in found else own)
    others = itertools.cycle(each for each in _all() if each not in found)
    return [each or next(others) for each in found]


def _all() -> Iterator[Style]:
    """Yields styles of which no two have both line and marker in common."""
    pure = (*_STYLES.values(), *_SPARE)
    for shift, first in itertools.product(range(len(pure)), range(len(pure))):
        one, two, three = (pure[(first + k * shift) % len(pure)] for k in range(3))
        yield Style(one.colour, two.line, three.marker, three.hatch)
