"""The command's results: a few files, written anew whenever something is known."""

import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.acceptance.rows import FAILED, PASSED, SKIPPED, Row, table

__all__ = ["FILES", "MOST", "OWN", "Report", "status", "summary"]

#: Files that a machine that is lent gives back.
MOST = 8
#: What sections leave in their folders for the output, besides the command's own three files.
FILES = ("bench_step.json", "bench_step.txt", "bench_step.png", "gpt.json")
#: The command's own.
OWN = ("acceptance.json", "acceptance.txt", "logs.tgz")
#: Where a file lies until it is whole.
_PART = "part"
assert len({*FILES, *OWN, _PART}) <= MOST
#: What the archive takes along of the sections' folders, and how large it may be: no checkpoints.
_LOGS, _LARGEST = (".txt", ".json", ".jsonl", ".png"), 2 << 20


class Report:
    """All that is known, in a folder of at most :data:`MOST` files.

    Args:
        output: an existing folder.
        work: the folder of the sections' own folders.
        about: facts about the run, for the JSON.
        order: names of the sections, in the order of the table.
        note: a line below the summary.
    """

    def __init__(
        self, output: Path, work: Path, about: dict[str, Any], order: Sequence[str], note: str
    ) -> None:
        self._output, self._work, self._about, self._note = output, work, about, note
        self._order = list(order)
        self._ended: list[Row] = []
        self._running: list[Row] = []
        self._write()

    @property
    def rows(self) -> list[Row]:
        """Returns all rows, in the order of the sections."""
        rows = [*self._ended, *self._running]
        return sorted(rows, key=lambda row: self._order.index(row.section))

    def add(self, rows: Sequence[Row]) -> None:
        """Takes the rows of a section that has ended, and packs its files."""
        self._ended += rows
        gone = {(row.section, row.check) for row in rows}
        self._running = [r for r in self._running if (r.section, r.check) not in gone]
        self._write()
        self._pack()

    def so_far(self, rows: Sequence[Row]) -> None:
        """Takes the rows that sections that still run have found."""
        if list(rows) != self._running:
            self._running = list(rows)
            self._write()
        self._copy()

    @property
    def text(self) -> str:
        """Returns the table, then what failed or missed its bar, whole."""
        rows = self.rows
        lines = [table(rows), "", f"commit {self._about.get('commit')}; {summary(rows)}"]
        lines.append(self._note)
        notable = [row for row in rows if row.missed]
        notable += [row for row in rows if row.status == FAILED]
        for row in notable:
            word = "FAILED" if row.status == FAILED else "MISSED"
            lines.append(f"{word}: {row.section}: {row.check}: {row.bar} {row.detail}")
        return "\n".join(lines if notable else [*lines, "nothing failed, no bar was missed"])

    def _write(self) -> None:
        rows = self.rows
        record = self._about | {
            "summary": summary(rows),
            "status": status(rows),
            "rows": [asdict(row) for row in rows],
        }
        self._place("acceptance.json", json.dumps(record, indent=1) + "\n")
        self._place("acceptance.txt", self.text + "\n")

    def _place(self, name: str, text: str) -> None:
        part = self._output / _PART
        part.write_text(text, encoding="utf-8")
        os.replace(part, self._output / name)

    def _copy(self) -> None:
        for name in FILES:
            for found in self._work.glob(f"*/{name}"):
                to = self._output / name
                if not to.exists() or to.stat().st_mtime < found.stat().st_mtime:
                    shutil.copy2(found, self._output / _PART)
                    os.replace(self._output / _PART, to)

    def _pack(self) -> None:
        self._copy()
        part = self._output / _PART
        with tarfile.open(part, "w:gz") as tar:
            for path in sorted(self._work.rglob("*")):
                if path.suffix in _LOGS and path.is_file() and path.stat().st_size < _LARGEST:
                    tar.add(path, path.relative_to(self._work))
        os.replace(part, self._output / "logs.tgz")


def status(rows: Sequence[Row]) -> int:
    """Returns the exit status: 0 only if nothing failed and something passed."""
    passed = any(row.status == PASSED for row in rows)
    return 0 if passed and not any(row.status == FAILED for row in rows) else 1


def summary(rows: Sequence[Row]) -> str:
    """Returns the counts in one line."""
    counts = [f"{sum(row.status == word for row in rows)} {word}" for word in (PASSED, FAILED)]
    counts.append(f"{sum(row.status == SKIPPED for row in rows)} skipped")
    bars = [row for row in rows if row.bar]
    missed = sum(row.missed for row in bars)
    return f"{', '.join(counts)}; bars: {len(bars) - missed} met, {missed} missed"
