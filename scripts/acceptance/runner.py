"""Runs sections as processes, side by side or alone, and keeps what they have found by then."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.acceptance.report import Report
from scripts.acceptance.rows import FAILED, PASSED, SKIPPED, Row, read

__all__ = ["Section", "Stage", "Stopped", "run_all"]

#: Seconds between two looks at the processes.
_LOOK = 0.2
#: Seconds at the end of the limit that remain for ending processes and writing.
_RESERVE = 5.0


@dataclass(frozen=True)
class Section:
    """A part of the acceptance, which processes of its own look at.

    Attributes:
        name: name of the module of :mod:`scripts.acceptance` and of its folder.
        what: for people.
        limit: seconds after which it is ended.
        needs_gpu: whether a rehearsal leaves it out.
        parts: number of processes that share it.
        least: seconds without which it is not started; then it is skipped and has not failed.
        part: which of the parts a process is.
        command: what to run in place of ``python -m scripts.acceptance.section NAME``.
    """

    name: str
    what: str
    limit: float = 600
    needs_gpu: bool = False
    parts: int = 1
    least: float = 0
    part: int = 0
    command: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        """Returns the name of a process's folder."""
        return self.name if self.parts == 1 else f"{self.name}-{self.part}"


@dataclass(frozen=True)
class Stage:
    """Sections that run side by side.

    Attributes:
        sections: in the order in which they are started.
        weight: its share of the time that is left, beside the weights of the stages behind it.
    """

    sections: Sequence[Section]
    weight: float


class Stopped(Exception):
    """Raised where the command itself is told to end."""


class _Job:
    """The process of a section, in a process group that it alone is in."""

    def __init__(self, section: Section, device: str, work: Path, limit: float) -> None:
        self.section, self.limit = section, limit
        self.folder = work / section.label
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log.txt"
        self.begin = time.monotonic()
        self.problem: str | None = None
        command = section.command or (
            *(sys.executable, "-m", "scripts.acceptance.section", section.name),
            *("--device", device, "--output", str(self.folder), "--seconds", f"{limit:.0f}"),
            *("--part", str(section.part), "--parts", str(section.parts)),
        )
        with self.log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own: what it started ends with it
                preexec_fn=_end_with_parent,
            )

    def ended(self) -> bool:
        """Returns whether the process has ended; one that is over its limit is killed."""
        code = self._process.poll()
        if code is None:
            if time.monotonic() - self.begin < self.limit:
                return False
            self.problem = f"did not end within {self.limit:.0f} s; its last line: {self._last()}"
        elif code:
            how = f"exit status {code}" if code > 0 else signal.Signals(-code).name
            self.problem = f"ended with {how}: {self._last()}"
        self.kill()
        return True

    def kill(self) -> None:
        """Ends the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # A process in the driver may take its time, or never end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)

    def rows(self, final: bool = False) -> list[Row]:
        """Returns what it has found by now; finally also how the process itself ended."""
        found = read(self.folder / "rows.jsonl")
        name = self.section.name
        if final and self.problem:
            found.append(Row(name, f"the section {self.section.label}", FAILED, self.problem))
        elif final and not found:
            found.append(Row(name, f"the section {self.section.label}", FAILED, "reported nothing"))
        return found

    def _last(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else "it printed nothing"


def _end_with_parent() -> None:
    """Has the kernel end this process where the command was killed and could not."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_all(
    stages: Sequence[Stage],
    device: str,
    work: Path,
    report: Report,
    deadline: float,
    say: Callable[[str], object] = print,
    at_once: int = 16,
) -> list[Row]:
    """Runs all stages, one after the other, and returns the rows of all their sections.

    The report is written anew whenever a section has found something or ended.

    Args:
        stages: in order.
        device: "cuda" or "cpu"; what needs a GPU is then not run.
        work: an existing folder for the sections' files.
        report: told about rows.
        deadline: of :func:`time.monotonic`, by which everything has ended and is written.
        say: told about progress.
        at_once: number of processes at a time.

    Raises:
        Stopped: a handler of signals has raised it; everything was ended and is in the report.
    """
    deadline -= min(_RESERVE, max(0.0, deadline - time.monotonic()) / 10)
    for number, stage in enumerate(stages):
        weights = [later.weight for later in stages[number:]]
        left = deadline - time.monotonic()
        until = time.monotonic() + left * weights[0] / sum(weights)
        _run(stage, device, work, report, until, say, at_once)
    return report.rows


def _run(
    stage: Stage,
    device: str,
    work: Path,
    report: Report,
    until: float,
    say: Callable[[str], object],
    at_once: int,
) -> None:
    waiting = [
        replace(section, part=part) for section in stage.sections for part in range(section.parts)
    ]
    if device == "cpu":
        for section in [section for section in waiting if section.needs_gpu]:
            waiting.remove(section)
            if section.part == 0:
                report.add([Row(section.name, section.what, SKIPPED, "not run: it needs a GPU")])
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                section = waiting.pop(0)
                left = until - time.monotonic()
                if left < max(section.least, 1):
                    report.add([_no_time(section, left)])
                    continue
                if section.part == 0:
                    say(f"{section.name}: {section.what}")
                running.append(_Job(section, device, work, min(section.limit, left)))
            for job in [job for job in running if job.ended()]:
                running.remove(job)
                found = job.rows(final=True)
                say(
                    f"{job.section.label}: {_counts(found)} in {time.monotonic() - job.begin:.0f} s"
                )
                report.add(found)
            report.so_far([row for job in running for row in job.rows()])
            time.sleep(_LOOK)
    except Stopped as stopped:
        for job in running:
            job.kill()
            job.problem = f"was running when the command was ended ({stopped})"
            report.add(job.rows(final=True))
        raise
    finally:
        for job in running:
            job.kill()


def _no_time(section: Section, left: float) -> Row:
    why = f"not run: of the time of the whole command (--limit) {max(left, 0):.0f} s were left"
    return Row(section.name, section.what, SKIPPED if section.least else FAILED, why)


def _counts(rows: Sequence[Row]) -> str:
    return ", ".join(
        f"{count} {word}"
        for word in (PASSED, FAILED, SKIPPED)
        if (count := sum(row.status == word for row in rows))
    )
