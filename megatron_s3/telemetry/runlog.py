"""`metrics.jsonl`, the log of a run: one JSON object a line."""

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from megatron_s3.log import say_here

__all__ = ["KEPT", "NAME", "RunLog", "finite", "read", "resumed"]

NAME = "metrics.jsonl"

#: The most lines that are kept while the disk cannot be written: a few megabytes.
KEPT = 1000


class RunLog:
    """The log of a run, to which lines are appended; a full disk does not end the run.

    If a line cannot be written, the newest :data:`KEPT` lines are kept and written as soon as the
    disk accepts them. One line is printed when writing fails, and one when it succeeds again.

    Args:
        folder: folder of the log, which is created if needed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._failed = False
        self._write_waiting()

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Writes one line and hands it to the operating system, which may reject it."""
        line = json.dumps({"kind": kind} | dict(record), allow_nan=False, default=_number)
        self._waiting.append(line.encode() + b"\n")
        if len(self._waiting) > KEPT:
            self._waiting.popleft()
            self._lost += 1
        self._write_waiting()

    def close(self) -> None:
        """Writes the lines that are kept, and waits until the disk has them."""
        self._write_waiting(sync=True)

    def _write_waiting(self, sync: bool = False) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The file is opened each time, because a handle stays invalid after ESTALE.
            with open(self.path, "a+b", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                # The line after one that a kill or a full disk cut off begins on a new line.
                if size:
                    file.seek(size - 1)
                    if file.read(1) != b"\n":
                        _write_all(file, b"\n")
                while self._waiting:
                    _write_all(file, self._waiting[0])
                    self._waiting.popleft()
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._failed:
                say_here(
                    f"{self.path} cannot be written: {error.strerror or error}; training goes on"
                )
            self._failed = True
            return
        if self._failed:
            lost = f"; {self._lost} lines are lost" if self._lost else ", and no line is lost"
            say_here(f"{self.path} is written again{lost}")
        self._failed, self._lost = False, 0


def _write_all(file: IO[bytes], line: bytes) -> None:
    while line:  # a disk that is nearly full may accept a part of the line
        line = line[file.write(line) or 0 :]


def finite(value: Any) -> Any:
    """Returns a value that JSON can hold: NaN, inf and -inf become text that float() reads."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Returns the records of a run in order, as one launch would have written them.

    A launch continues from a checkpoint, so records of an earlier launch after that checkpoint are
    left out. Lines that were cut off or damaged are left out too.

    Args:
        folder: folder of the log, or the log itself.

    Raises:
        FileNotFoundError: there is no log.
    """
    path = Path(folder)
    path = path / NAME if path.is_dir() else path
    return resumed(_parsed(path.read_text(encoding="utf-8", errors="replace").splitlines()))


def _parsed(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            yield record


def resumed(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records of several launches without those that a later launch repeats."""
    kept: list[dict[str, Any]] = []
    for record in records:
        if record["kind"] == "start":
            kept = [r for r in kept if _at(r) <= record["iteration"]]
        if record["kind"] == "spike":  # written when it begins and again when it ends
            kept = [r for r in kept if r["kind"] != "spike" or r["onset"] != record["onset"]]
        kept.append(record)
    return kept


def _at(record: Mapping[str, Any]) -> float:
    # A finished spike counts by its end; a launch finds a spike again that had not ended.
    return record.get("end") or record.get("iteration") or record.get("onset") or 0
