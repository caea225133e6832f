"""Trains with a feature in a release of Megatron, resumes, and compares."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.harness.forks import TRAINER, Forks
from tests.harness.models import TINY
from tests.harness.runs import Run
from tests.matrix.features import Row
from tests.matrix.verdicts import ABSENT, LIMIT, failure, note, other_groups, verdict

__all__ = ["Release", "Trial", "releases"]

STEPS, SAVED = 5, 3
MODEL = [
    *TINY,
    *f"""--lr-decay-iters 1000 --eval-iters 0 --train-iters {STEPS}
    --save-interval {SAVED}""".split(),
]


@dataclass(frozen=True)
class Release:
    """A Megatron to run in: its name in the table, its folder (None: installed), its program."""

    name: str
    folder: Path | None
    program: str


class Trial:
    """Runs of one release, in a folder of their own.

    Args:
        release: where.
        losses: S3's of the rows that were run before, by their names.
    """

    def __init__(self, release: Release, losses: Callable[[str], dict[str, str]]) -> None:
        self.release = release
        self.losses = losses
        self._forks: Forks | None = None

    def cell(self, row: Row) -> dict[str, Any]:
        """The row in this release."""
        begun = time.monotonic()
        s3 = self._attempt(row, "s3", row.change)
        alone = s3
        if s3["outcome"] == "failed" and row.stand_in and not ABSENT.search(s3["error"]):
            s3 = self._attempt(row, "s3", row.stand_in)
        adam = None
        if row.groups or s3["outcome"] != "bitwise":
            change = row.change if s3 is alone else row.stand_in
            if not ABSENT.search(s3.get("error", "")):
                adam = self._attempt(row, "adam", change)
        if row.groups and adam and "groups" in s3 and "groups" in adam:
            s3["wrong"] += other_groups(s3["groups"], adam["groups"])
        result = {"verdict": verdict(s3, adam), "note": note(s3, adam), "s3": s3, "adam": adam}
        if s3 is not alone:
            result["without stand-in"] = alone["error"]
        for attempt in (s3, adam or {}):
            attempt.pop("groups", None)
        return result | {"seconds": round(time.monotonic() - begun, 1)}

    def _attempt(self, row: Row, optimizer: str, change: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
            return self._train(row, optimizer, change, Path(folder))

    def _train(self, row: Row, optimizer: str, change: str, folder: Path) -> dict[str, Any]:
        words = [*MODEL, *row.flags.split(), "--optimizer", optimizer]
        through, resumed = folder / "through", folder / "resumed"
        result: dict[str, Any] = {"outcome": "failed", "wrong": []}
        run = self._run(row, change, [*words, "--save", str(through)])
        known = [f for f in row.droppable.split() if f.startswith("--") and f in run.log]
        if run.returncode and known and ABSENT.search(run.log):
            words = _without(words, row.droppable.split())
            run = self._run(row, change, [*words, "--save", str(through)])
        losses = _losses(run)
        if run.returncode or str(STEPS) not in losses:
            return result | failure(run)
        result |= {"outcome": "not resumed", "losses": losses}
        if optimizer == "s3":
            result["wrong"] += self._wrong(row, run, losses)
        if not (through / f"iter_{SAVED:07d}").is_dir():
            return result | {"error": "trained, and saved nothing", "refused": False}
        (through / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
        run = self._run(row, change, [*words, "--load", str(through), "--save", str(resumed)])
        after = _losses(run)
        if run.returncode or str(STEPS) not in after or str(SAVED) in after:
            return result | failure(run)
        result["same losses"] = after[str(STEPS)] == losses[str(STEPS)]
        ends = [f / f"iter_{STEPS:07d}" for f in (through, resumed)]
        output = folder / "compared.json"
        argv = [*map(str, ends), str(through / f"iter_{SAVED:07d}"), str(output)]
        run = self._run(row, "", argv, program="tests.matrix.compare", ranks=1)
        if run.returncode:
            return result | {"outcome": "not compared"} | failure(run)
        found = json.loads(output.read_text())
        still = found.pop("still")
        result |= {"outcome": "differs" if found["differ"] else "bitwise"} | found
        frozen = re.compile(row.frozen or "(?!)")
        result["wrong"] += [
            f"{name} did not change"
            for name in still
            if re.search("exp_(avg|pnorm)", name) and not frozen.search(name)
        ]
        if row.frozen and not any(frozen.search(name) for name in still):
            result["wrong"].append(f"nothing that matches {row.frozen} stayed as it was")
        return result

    def _run(
        self, row: Row, change: str, argv: list[str], program: str = "", ranks: int = 0
    ) -> Run:
        if self._forks is None:
            self._forks = Forks(self.release.folder, self.release.program)
        if change:
            program, argv = "tests.matrix.changes", [change, self.release.program, *argv]
        with tempfile.NamedTemporaryFile("r", errors="replace") as log:
            try:
                status = self._forks.run(argv, ranks or row.ranks, log.name, program or None, LIMIT)
            except RuntimeError:
                self._forks = None
                raise
            return Run(status, log.read())

    def _wrong(self, row: Row, run: Run, losses: dict[str, str]) -> list[str]:
        wrong = []
        if not any(re.match("S3 .* with ", line) for line in run.said):
            wrong.append("S3 has not said that it was built")
        if row.says and not re.search(row.says, run.log):
            wrong.append(f"the log does not hold {row.says!r}")
        if re.search(r"number of (?:skipped|nan) iterations: +[1-9]", run.log):
            wrong.append("an iteration was skipped")
        expected = self.losses(row.like) if row.like else {}
        if expected and losses != expected:
            wrong.append(f"other losses than {row.like}")
        if any(not abs(float(loss)) < 100 for loss in losses.values()):
            wrong.append("a loss is not finite")
        return wrong

    def close(self) -> None:
        """Ends the process that forks."""
        if self._forks is not None:
            self._forks.close()


def _losses(run: Run) -> dict[str, str]:
    """As they are kept in JSON."""
    return {str(iteration): loss for iteration, loss in run.column("lm loss").items()}


def _without(words: list[str], dropped: list[str]) -> list[str]:
    text = f" {' '.join(words)} "
    for flag in re.findall(r"--\S+(?: (?!--)\S+)?", " ".join(dropped)):
        text = text.replace(f" {flag} ", " ")
    return text.split()


def releases(named: Iterable[str]) -> list[Release]:
    """The installed release, and those given as NAME=FOLDER."""
    found = [Release(version("megatron-core"), None, TRAINER)]
    for text in named:
        name, _, folder = text.partition("=")
        path = Path(folder).expanduser().resolve()
        if not folder or not (path / "megatron/core").is_dir():
            raise SystemExit(f"error: --release {text}: expected NAME=FOLDER that holds megatron/")
        script = path / "pretrain_gpt.py"
        found.append(Release(name, path, str(script) if script.exists() else TRAINER))
    return found
