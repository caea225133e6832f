"""The cells that are known, and the table of them."""

import contextlib
import fcntl
import functools
import json
import os
import re
import subprocess
import textwrap
import threading
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.matrix.features import ROWS, Row
from tests.matrix.trials import Release

__all__ = ["SHOWN", "Results", "markdown"]

#: A cell's verdict and how the table shows it.
SHOWN = {
    "bitwise": "bitwise",
    "losses": "losses",
    "trained": "trained",
    "refused": "refused",
    "not here": "not here",
    "absent": "–",
    "defect": "**DEFECT**",
}
STAND_IN = (
    "with Megatron's own norms, or attention, made to work on parts of a sequence "
    "(tests/matrix/changes.py): without that it asks for Transformer Engine's."
)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Results:
    """The cells of DIR/matrix.json, which is written after each; by several of this, too."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "matrix.json"
        self._lock = threading.Lock()
        self.data: dict[str, Any] = {"releases": {}, "cells": {}}
        self._read()

    def _read(self) -> None:
        if self.file.exists():
            self.data = json.loads(self.file.read_text())

    def cell(self, release: str, row: str) -> dict[str, Any] | None:
        """A cell, or None."""
        return self.data["cells"].get(release, {}).get(row)

    def keep(self, release: Release, row: Row, cell: dict[str, Any]) -> None:
        """Adds a cell and writes everything."""
        with self._lock, _locked(self.file.parent):
            self._read()
            packages = {"torch": version("torch"), "date": date.today().isoformat()}
            self.data["releases"][release.name] = packages | {"runs": Path(release.program).name}
            cell |= {"flags": row.flags, "ranks": row.ranks, "commit": _commit()}
            self.data["cells"].setdefault(release.name, {})[row.name] = cell
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.data, indent=1, sort_keys=True) + "\n")
            temporary.replace(self.file)


@functools.cache
def _commit() -> str:
    """Of the code that runs; empty outside a checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--exclude=*",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def markdown(data: dict[str, Any], merged: bool = False) -> str:
    """The Markdown table of all cells, and the notes to them.

    Args:
        data: of :class:`Results`.
        merged: whether neighbours of a group with the same cells share a line.
    """
    releases = sorted(data["releases"], key=lambda name: (name == "main", name))
    notes: dict[str, int] = {}
    lines: list[tuple[str, list[str], list[str]]] = []  # group, features, cells
    for row in ROWS:
        cells = [data["cells"].get(name, {}).get(row.name) for name in releases]
        shown = [str(row.ranks), *(_shown(cell, notes) for cell in cells)]
        if merged and lines and (lines[-1][0], lines[-1][2]) == (row.group, shown):
            lines[-1][1].append(row.name)
        else:
            lines.append((row.group, [row.name], shown))
    text = [f"| feature | ranks | {' | '.join(releases)} |", f"|---|---|{'---|' * len(releases)}"]
    for number, (group, features, shown) in enumerate(lines):
        if not number or lines[number - 1][0] != group:
            text.append(f"| **{group}** | | {'| ' * len(releases)}|")
        text.append(f"| {', '.join(features)} | {' | '.join(shown)} |")
    text += ["", *(f"{number}. {said}" for said, number in notes.items())]
    if any("†" in cell for _, _, shown in lines for cell in shown):
        text += ["", f"† {STAND_IN}"]
    counts = [cell["verdict"] for cells in data["cells"].values() for cell in cells.values()]
    text += ["", ", ".join(f"{counts.count(word)} {word}" for word in SHOWN if word in counts)]
    commits = {c.get("commit", "") for cells in data["cells"].values() for c in cells.values()}
    text[-1] += f"; commits {', '.join(sorted(commits - {''}) or ['unknown'])}"
    return "\n".join(text)


def _shown(cell: dict[str, Any] | None, notes: dict[str, int]) -> str:
    if cell is None:
        return ""
    text = SHOWN[cell["verdict"]]
    if "without stand-in" in cell:
        text += " †"
    if cell["note"]:
        plain = re.sub(r"/\S*/(?=megatron)", "", cell["note"])
        text += f" [{notes.setdefault(textwrap.shorten(plain, 250), len(notes) + 1)}]"
    return text
