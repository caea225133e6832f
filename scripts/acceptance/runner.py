"""Runs sections as processes with time limits; the command's tables, files and exit status."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.acceptance.rows import FAILED, PASSED, SKIPPED, Row, read

__all__ = ["Section", "run", "run_all", "status", "summary", "write"]


@dataclass(frozen=True)
class Section:
    """A part of the acceptance, which a process of its own looks at.

    Attributes:
        name: of the module of :mod:`scripts.acceptance` and of its folder in the output.
        what: for people.
        limit: seconds until it is ended.
        command: what to run in place of ``python -m scripts.acceptance.section NAME``.
    """

    name: str
    what: str
    limit: float
    command: tuple[str, ...] | None = None


def run(section: Section, device: str, output: Path, left: float) -> list[Row]:
    """One section's rows; what it printed goes to ``OUTPUT/NAME/log.txt``.

    Args:
        section: which.
        device: "cuda" or "cpu".
        output: the folder of the whole run.
        left: seconds that the whole run has left.
    """
    folder = output / section.name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    if left <= 0:
        why = "not run: the time of the whole command was used up (--limit)"
        return [Row(section.name, section.what, FAILED, why)]
    limit = min(section.limit, left)
    command = section.command or (
        *(sys.executable, "-m", "scripts.acceptance.section", section.name),
        *("--device", device, "--output", str(folder)),
    )
    with log.open("w", encoding="utf-8") as file:
        # A group of its own: what it started ends with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        problem = None
        try:
            code = process.wait(limit)
            if code:
                ended = f"exit status {code}" if code > 0 else signal.Signals(-code).name
                problem = f"ended with {ended}: {_last_line(log)}"
        except subprocess.TimeoutExpired:
            problem = f"did not end within {limit:.0f} s; its last line: {_last_line(log)}"
        finally:
            _end(process)
    rows = read(folder / "rows.jsonl")
    if problem:
        rows.append(Row(section.name, "the section itself", FAILED, problem))
    elif not rows:
        rows.append(Row(section.name, "the section itself", FAILED, "reported nothing"))
    return rows


def run_all(
    sections: Sequence[Section], device: str, output: Path, limit: float, say=print
) -> list[Row]:
    """The rows of all sections, one after the other.

    Args:
        sections: in order.
        device: "cuda" or "cpu".
        output: an existing folder.
        limit: seconds for all of them.
        say: told about progress.
    """
    begin = time.monotonic()
    rows: list[Row] = []
    for section in sections:
        say(f"{section.name}: {section.what}")
        started = time.monotonic()
        found = run(section, device, output, limit - (started - begin))
        counts = ", ".join(
            f"{n} {word}"
            for word in (PASSED, FAILED, SKIPPED)
            if (n := sum(row.status == word for row in found))
        )
        say(f"{section.name}: {counts} in {time.monotonic() - started:.0f} s")
        rows += found
    return rows


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process in the driver may take its time, or never end.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it printed nothing"


def status(rows: Sequence[Row]) -> int:
    """The exit status: 0 only if nothing failed and something passed."""
    passed = any(row.status == PASSED for row in rows)
    return 0 if passed and not any(row.status == FAILED for row in rows) else 1


def summary(rows: Sequence[Row]) -> str:
    """One line."""
    counts = [f"{sum(row.status == word for row in rows)} {word}" for word in (PASSED, FAILED)]
    counts.append(f"{sum(row.status == SKIPPED for row in rows)} skipped")
    bars = [row for row in rows if row.bar]
    missed = sum(row.missed for row in bars)
    return f"{', '.join(counts)}; bars: {len(bars) - missed} met, {missed} missed"


def write(rows: Sequence[Row], about: dict, text: str, output: Path) -> None:
    """Writes ``acceptance.json`` and ``acceptance.txt``."""
    record = about | {"status": status(rows), "rows": [asdict(row) for row in rows]}
    with (output / "acceptance.json").open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
    (output / "acceptance.txt").write_text(text + "\n", encoding="utf-8")
