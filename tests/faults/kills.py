"""SIGKILL of ranks in the middle of a step, of a save, of a save over another."""

import contextlib
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from megatron_s3.storage import checksums
from megatron_s3.storage.errors import Damaged
from megatron_s3.storage.layout import INDEX, TRACKER
from tests.faults.bench import EVERY_OTHER, MODES, S3, Bench, last_file, latest, saved_at_once
from tests.faults.rows import Row
from tests.harness.forks import kill
from tests.harness.runs import Run
from tests.harness.tensors import same, tensors

__all__ = ["kills", "overwrites"]


def kills(bench: Bench) -> list[Row]:
    """Of one rank and of all, in the middle of a step, and at random instants of a save."""
    rows = []
    iters = 8 if bench.args.brief else 24
    cases = [
        (mode, victims, during)
        for mode in MODES
        for victims in ("one rank", "all ranks")
        for during in ("save", "step")
    ]
    if bench.args.brief:
        # In saves: one rank, synchronous; all, asynchronous; one, fsdp_dtensor.
        cases = [cases[0], cases[6], cases[8]]
    for mode, victims, during in cases:
        row = Row(f"kill -9 of {victims} in a{'n' * (mode[0] == 'a')} {mode} {during}")
        end = bench.reference(*saved_at_once(mode), iters=iters)
        wanted = bench.args.kills if during == "save" else max(1, bench.args.kills // 3)
        while row.tried < wanted:
            _chain(bench, row, mode, iters, end, victims, during, wanted)
        row.count("at")
        rows.append(row)
    return rows


def _chain(
    bench: Bench,
    row: Row,
    mode: str,
    iters: int,
    end: Path,
    victims: str,
    during: str,
    wanted: int,
) -> None:
    """One run, killed and resumed until it has ended."""
    folder = bench.new("killed")
    expected, pending = 0, []
    while True:
        more = row.tried + len(pending) < wanted
        watch = _Killer(bench, folder, iters, victims, during, mode) if more else None
        run = bench.run(
            *S3, *MODES[mode], "--train-iters", iters, *EVERY_OTHER,
            "--save", folder, "--load", folder, watch=watch,
        )  # fmt: skip
        if run.loaded != expected:
            pending.append({"at": "?", "fault": f"loaded {run.loaded}, not {expected}"})
        if watch and watch.at:
            expected = latest(folder, last_file(mode))
            pending.append({"at": watch.at, "iteration": watch.iteration, "latest": expected})
            continue
        break
    lost = [p for p in pending if "fault" in p]
    why = lost[0]["fault"] if lost else None
    if run.returncode:
        why = why or run.error or f"status {run.returncode}"
    elif not same(tensors(folder, iters), tensors(end, iters)):
        why = why or "other tensors at the end"
    elif (
        run.losses
        and run.losses.get(iters, (end / "loss").read_text()) != (end / "loss").read_text()
    ):
        why = why or "another loss at the end"
    for p in pending:
        if "fault" not in p:
            row.add("lost" if why else "survived", **p, why=why)
    row.progress()
    if why:
        shutil.copy(bench.folder / "log.txt", bench.args.out / f"lost-{row.tried}.txt")
    shutil.rmtree(folder)


def overwrites(bench: Bench) -> list[Row]:
    """SIGKILL while another run's files of the same iteration are written over.

    What is taken for a checkpoint afterwards has to be one of the two, whole.
    """
    rows = []
    for mode in list(MODES)[: bench.args.overwritten]:
        row = Row(f"kill -9 of all ranks, {mode} save over another")
        old = bench.reference(*saved_at_once(mode))
        last = last_file(mode)

        def resume(folder: Path, *flags: str, watch: Any = None, mode: str = mode) -> Run:
            flags = (*MODES[mode], *flags, "--train-iters", "6", *EVERY_OTHER)
            return bench.run(*S3, *flags, "--load", folder, "--save", folder, watch=watch)

        def again(old: Path = old) -> Path:
            folder = bench.new("overwritten") / "run"
            shutil.copytree(old, folder)
            (folder / TRACKER).write_text("2")
            return folder

        other = ["--seed", "4321"]  # other data
        folder = again()
        run = resume(folder, *other)
        assert run.returncode == 0, run.log[-3000:]
        truths = [tensors(path, 4) for path in (old, folder)]
        assert not same(*truths)
        for _ in range(bench.args.kills):
            folder = again()
            watch = _Killer(bench, folder, 6, "all ranks", "save", mode)
            watch.iteration = 4
            watch.stage = bench.rng.choice(("folder", "rewritten", "rewritten"))
            longest = 0.4 if watch.stage == "folder" else 0.01
            watch.delay = bench.rng.choice((0, bench.rng.uniform(0, longest)))
            resume(folder, *other, watch=watch)
            what = {"at": watch.at, "delay": round(watch.delay, 4)}
            written = folder / "iter_0000004"
            try:
                checksums.check(written, config=last != INDEX)
                checksums.verify(written)
            except Damaged as caught:
                row.add("survived", **what, then="refused", said=str(caught))
            else:
                found = tensors(folder, 4)
                which = [name for name, truth in zip(("old", "new"), truths, strict=True)
                         if same(found, truth)]  # fmt: skip
                row.add("survived" if which else "falsely_accepted", **what, then=" ".join(which))
            expected = latest(folder, last)
            run = resume(folder)
            if run.returncode or run.loaded != expected:
                row.add("lost", then="not resumed", said=run.error)
            row.progress()
            shutil.rmtree(folder)
        row.count("then")
        rows.append(row)
    return rows


class _Killer:
    """Waits for an instant, then kills.

    Attributes:
        at: what a save had done by then; empty: there was no kill.
        iteration: that was to be saved.
    """

    # What appears in a save, one after another.
    STAGES = ("folder", "__0_0", "__1_0", "half", ".metadata", "metadata.json", "sums", "tracker")

    def __init__(
        self, bench: Bench, folder: Path, iters: int, victims: str, during: str, mode: str
    ) -> None:
        rng = bench.rng
        self.folder, self.victims, self.last = folder, victims, last_file(mode)
        resumed = latest(folder, self.last)
        # It gets on: half of the kills come after a save at least.
        self.iteration = min(resumed + 2 * rng.randint(1, 2), iters)
        self.stage = rng.choice([s for s in self.STAGES if self.last != INDEX or s[0] != "m"])
        self.delay = rng.choice((0, rng.uniform(0, 0.003), rng.uniform(0, 0.03)))
        if during == "step":
            self.stage, self.iteration = "step", resumed + rng.randint(1, 3)
            self.delay = rng.uniform(0, 0.06)
        self.rank = rng.randrange(2)
        self.at = ""
        self._log = bench.folder / "log.txt"
        self._log_size, self._text = 0, ""
        self._since: float | None = None
        self._saving = False
        self._before: set[tuple[str, int]] | None = None

    def __call__(self, pids: list[int]) -> bool:
        if self._since is None:
            if not self._reached():
                return False
            self._since = time.monotonic()
        if time.monotonic() - self._since < self.delay:
            return False
        # One rank is killed alone: what it has started lives on until it is swept up.
        for pid in pids if self.victims == "all ranks" else [pids[self.rank]]:
            if self.victims == "all ranks":
                kill(pid)
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.at = self._what()
        return True

    def _reached(self) -> bool:
        here = self.folder / f"iter_{self.iteration:07d}"
        if self.stage == "step":
            return self._logged(rf"iteration +{self.iteration}/")
        # A save that was killed before has left files of this iteration.
        self._saving = self._saving or self._logged(
            rf"saving checkpoint at iteration +{self.iteration} "
        )
        if not self._saving:
            return False
        if self.stage == "folder":
            return here.exists()
        if self.stage == "rewritten":  # one file of another save's
            with contextlib.suppress(OSError):
                now = {(f.name, f.stat().st_mtime_ns) for f in here.glob("*.distcp")}
                self._before = now if self._before is None else self._before
                return now != self._before
            return False
        if self.stage == "tracker":
            return latest(self.folder, self.last) >= self.iteration
        if self.stage == "half":
            with contextlib.suppress(OSError):
                return sum(f.stat().st_size for f in here.glob("*.distcp")) > 300_000
            return False
        name = {"sums": "checksums.sha256"}.get(self.stage, self.stage)
        with contextlib.suppress(OSError):
            return any(f.name.startswith(name) for f in here.iterdir())
        return False

    def _logged(self, pattern: str) -> bool:
        with contextlib.suppress(OSError):
            if self._log.stat().st_size != self._log_size:
                self._text = self._log.read_text(errors="replace")
                self._log_size = self._log.stat().st_size
        return re.search(pattern, self._text) is not None

    def _what(self) -> str:
        """How far the save had come."""
        if self.stage == "step":
            return "in a step"
        here = self.folder / f"iter_{self.iteration:07d}"
        if latest(self.folder, self.last) >= self.iteration:
            return "7 done"
        names = {f.name for f in here.iterdir()} if here.exists() else set()
        for number, name in ((6, "checksums.sha256"), (5, "metadata.json"), (4, ".metadata")):
            if name in names:
                return f"{number} {name} there"
        if ".metadata.tmp" in names:
            return "3 .metadata begun"
        return "2 data begun" if any("distcp" in n for n in names) else "1 folder there"
