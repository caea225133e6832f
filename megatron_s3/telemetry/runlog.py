"""`metrics.jsonl`: what a run logged, one JSON object a line."""

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from megatron_s3.log import say_here

__all__ = ["KEPT", "NAME", "RunLog", "read"]

NAME = "metrics.jsonl"

#: Lines that wait for a disk which takes nothing, at most: a few megabytes.
KEPT = 1000


class RunLog:
    """Appends to the log of a run, which a disk that takes nothing does not end.

    Lines that could not be written are kept, the newest :data:`KEPT` of them, and written as soon
    as the disk takes them; that it does not, and that it does again, is printed once each.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._failed = False
        self._write_waiting()

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Writes one line, which the operating system has when this returns, if it takes it."""
        line = json.dumps({"kind": kind} | dict(record), allow_nan=False, default=_number)
        self._waiting.append(line.encode() + b"\n")
        if len(self._waiting) > KEPT:
            self._waiting.popleft()
            self._lost += 1
        self._write_waiting()

    def close(self) -> None:
        """Writes to the disk."""
        self._write_waiting(sync=True)

    def _write_waiting(self, sync: bool = False) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened anew, since a handle is worth nothing after ESTALE.
            with open(self.path, "a+b", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                # A line that a kill or a full disk has cut off must not take the next one with it.
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
    while line:  # a disk that is nearly full takes a part
        line = line[file.write(line) or 0 :]


def finite(value: Any) -> Any:
    """Returns what JSON can hold: NaN, inf and -inf as text, which float() reads."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Returns the records of a run in order, as one launch would have written them.

    A launch goes on from a checkpoint: what an earlier one wrote beyond that is left out, and so is
    a line that was cut off.

    Args:
        folder: that holds the log, or the log itself.

    Raises:
        FileNotFoundError: there is no log.
    """
    path = Path(folder)
    path = path / NAME if path.is_dir() else path
    return resumed(_parsed(path.read_text(encoding="utf-8").splitlines()))


def _parsed(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            yield record


def resumed(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of several launches, without what a later launch has done again."""
    kept: list[dict[str, Any]] = []
    for record in records:
        if record["kind"] == "start":
            kept = [r for r in kept if _at(r) <= record["iteration"]]
        if record["kind"] == "spike":  # written when it begins, and again when it is over
            kept = [r for r in kept if r["kind"] != "spike" or r["onset"] != record["onset"]]
        kept.append(record)
    return kept


def _at(record: Mapping[str, Any]) -> float:
    # A spike is known at its end; one under way then is found again.
    return record.get("end") or record.get("iteration") or record.get("onset") or 0
