"""Rows of a report: sections write them as they are found, the command reads and prints them."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, Any

from tests.harness.tables import columns

__all__ = ["FAILED", "PASSED", "SKIPPED", "Row", "Writer", "read", "table"]

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        section: the section that found it.
        check: what was looked at.
        status: :data:`PASSED`, :data:`FAILED` or :data:`SKIPPED`.
        detail: what was found, or why it failed or was skipped; one line.
        bar: "" or how a measurement compares with what the project wants of it, such as
            "0.91 >= 0.90 met"; a bar that is missed fails nothing.
        figures: numbers behind it, for the JSON.
    """

    section: str
    check: str
    status: str
    detail: str = ""
    bar: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def missed(self) -> bool:
        """Whether it has a bar that was missed."""
        return self.bar.endswith("missed")


class Writer:
    """A file to which a section adds its rows, one JSON object a line.

    Args:
        section: its name.
        file: open for writing.
    """

    def __init__(self, section: str, file: IO[str]) -> None:
        self._section, self._file, self._lock = section, file, Lock()

    def row(self, check: str, status: str, detail: str = "", bar: str = "", **figures: Any) -> None:
        """Reports one; it is on the disk when this returns."""
        row = Row(self._section, check, status, " ".join(detail.split()), bar, figures)
        with self._lock:  # a section may look at several things at once
            print(f"{status}: {check}: {row.detail} {bar}", flush=True)
            self._file.write(json.dumps(asdict(row)) + "\n")
            self._file.flush()

    def passed(self, check: str, detail: str = "", bar: str = "", **figures: Any) -> None:
        """A row of that status."""
        self.row(check, PASSED, detail, bar, **figures)

    def failed(self, check: str, detail: str, **figures: Any) -> None:
        """A row of that status."""
        self.row(check, FAILED, detail, **figures)

    def skipped(self, check: str, why: str) -> None:
        """A row of that status."""
        self.row(check, SKIPPED, why)

    def measured(
        self,
        check: str,
        value: float,
        *,
        least: float | None = None,
        most: float | None = None,
        **more,
    ) -> None:
        """A measurement beside its bar.

        Args:
            check: what was measured.
            value: the figure; one that is not finite and above 0 fails.
            least, most: the bar, one of the two.
            **more: ``detail`` and figures.
        """
        bar, sign = (least, ">=") if least is not None else (most, "<=")
        detail = more.pop("detail", "")
        if not (math.isfinite(value) and value > 0):
            self.failed(check, f"measured {value}; {detail}", value=value, **more)
            return
        met = value >= bar if sign == ">=" else value <= bar
        text = f"{value:.3f} {sign} {bar:.2f} {'met' if met else 'missed'}"
        self.passed(check, detail, text, value=value, **more)


def read(path: Path) -> list[Row]:
    """The rows of a file that a :class:`Writer` wrote; a torn last line is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(Row(**json.loads(line)))
            except (ValueError, TypeError):
                break
    return rows


def table(rows: Iterable[Row], width: int = 78) -> str:
    """Rows for people; details are cut off at a width, the JSON has them whole."""
    cells = [("section", "check", "result", "bar", "detail")]
    previous = ""
    for row in rows:
        detail = row.detail if len(row.detail) <= width else row.detail[: width - 3] + "..."
        section = "" if row.section == previous else row.section
        cells.append((section, row.check, row.status.upper(), row.bar, detail))
        previous = row.section
    return columns(cells)
