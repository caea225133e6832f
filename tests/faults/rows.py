"""What became of each kind of fault: rows of a table."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.harness.tables import columns

__all__ = ["Row", "report"]


@dataclass
class Row:
    """What became of one kind of fault.

    Attributes:
        fault: what was done.
        tried: how often.
        survived: what must hold did hold.
        lost: the run did not go on from its latest complete checkpoint, or not to the same end.
        falsely_accepted: something else than what was saved was taken for it.
        notes: counts of what was seen.
        tries: each one.
    """

    fault: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    falsely_accepted: int = 0
    notes: str = ""
    tries: list[dict] = field(default_factory=list)

    def add(self, outcome: str, **what: Any) -> None:
        """Counts a try: survived, lost or falsely_accepted."""
        self.tried += 1
        setattr(self, outcome, getattr(self, outcome) + 1)
        self.tries.append({"outcome": outcome, **what})

    def count(self, *names: str) -> None:
        """Notes how often each value of these entries of the tries was seen."""
        seen = Counter(str(t[n]) for n in names for t in self.tries if t.get(n) is not None)
        self.notes = "; ".join(
            filter(None, [self.notes, ", ".join(f"{k} {v}" for k, v in sorted(seen.items()))])
        )

    def progress(self) -> None:
        """Prints one line; of what went wrong, another."""
        bad = f", {self.lost} lost, {self.falsely_accepted} falsely accepted"
        print(
            f"[{time.strftime('%H:%M:%S')}] {self.fault}: {self.survived} of {self.tried}"
            + (bad if self.lost or self.falsely_accepted else ""),
            flush=True,
        )
        if self.tries and self.tries[-1]["outcome"] != "survived":
            print("   ", self.tries[-1], flush=True)


def report(rows: list[dict]) -> str:
    """Returns the rows as text."""
    head = ("fault", "tried", "survived", "lost", "falsely accepted", "what was seen")
    keys = ("fault", "tried", "survived", "lost", "falsely_accepted", "notes")
    total = [str(sum(row[k] for row in rows)) for k in keys[1:5]]
    cells = [[str(row[k]) for k in keys] for row in rows]
    return columns([head, *cells, ["all", *total, ""]], right=range(1, 5))
