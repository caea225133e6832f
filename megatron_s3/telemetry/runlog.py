"""`metrics.jsonl`: what a run logged, one JSON object a line."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["NAME", "RunLog", "read"]

NAME = "metrics.jsonl"


class RunLog:
    """Appends to the log of a run.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        # A line that a kill has cut off must not take the next one with it.
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = self.path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """One line, in the hands of the operating system when this returns."""
        line = json.dumps({"kind": kind} | dict(record), allow_nan=False, default=_number)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Writes to the disk, and closes."""
        os.fsync(self._file.fileno())
        self._file.close()


def finite(value: Any) -> Any:
    """As JSON can hold it: NaN and infinities as "nan", "inf" and "-inf", which float() reads."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run in order, as one launch would have written them.

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
