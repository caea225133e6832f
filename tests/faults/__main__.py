#!/usr/bin/env python3
"""What becomes of runs and checkpoints when things break, with Megatron's trainer on CPU ranks.

    python -m tests.faults [--only NAME ...] [--kills N] [--flips N] [--seed N] [--out DIR]

Kills ranks in the middle of steps and of saves, sends signals, fills the disk, damages each file
of a checkpoint, spoils gradients on one rank, and resumes with what does not fit; then looks at
what is left.  Faults whose result is in DIR/faults.json with the same settings are not repeated
(--again does).  Writes DIR/faults.json and DIR/faults.txt.

Ranks are forks of this process (:mod:`tests.harness.forks`), killed with all they started, as
torchrun and SLURM do it.
"""

import argparse
import contextlib
import datetime
import io
import itertools
import json
import os
import pickle
import platform
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
os.environ.setdefault("LOCAL_WORLD_SIZE", "8")

import torch  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from tests.harness import forks  # noqa: E402
from tests.harness.trainer import TINY, Run, tensors  # noqa: E402

S3 = ["--optimizer", "s3"]
ADAMW = ["--optimizer", "adamw"]
SHARDED = ["--bf16", "--use-distributed-optimizer"]
ASYNC = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
QUICK = ["--num-layers", "1", "--eval-iters", "0", "--num-workers", "0"]
EVERY_OTHER = ["--save-interval", "2"]
FORMATS = {
    "torch_dist": SHARDED,
    "fsdp_dtensor": [*SHARDED, "--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor"],
    "torch_dcp": [
        *("--bf16", "--use-torch-fsdp2", "--untie-embeddings-and-output-weights"),
        *("--ckpt-format", "torch_dcp"),
    ],
}
#: How it is saved while something happens.
MODES = {
    "synchronous": SHARDED,
    "asynchronous": [*SHARDED, *ASYNC],
    "fsdp_dtensor": FORMATS["fsdp_dtensor"],
    "torch_dcp": FORMATS["torch_dcp"],
}
TRACKER = "latest_checkpointed_iteration.txt"
#: Of formats without ``metadata.json``: what torch writes last.
INDEX = ".metadata"


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


class Bench:
    """Where the runs are, and how many of each there are."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.rng = random.Random(args.seed)
        self._number = 0
        self._references: dict[tuple, Path] = {}

    def new(self, name: str) -> Path:
        """An empty folder."""
        self._number += 1
        path = self.folder / f"{name}-{self._number}"
        path.mkdir()
        return path

    def run(
        self,
        *flags: Any,
        ranks: int = 2,
        hook: str = "",
        watch: Callable[[list[int]], bool] | None = None,
        base: list[str] | None = None,
    ) -> Run:
        """Trains; ``watch`` is asked all the time, with the ranks' ids, until it says True."""
        log = self.folder / "log.txt"
        log.unlink(missing_ok=True)
        argv = [*(TINY + QUICK if base is None else base), *map(str, flags)]
        program = forks.TRAINER
        if hook:
            program, argv = str(Path(__file__).resolve()), ["--as-rank", hook, *argv]
        pids = forks.start(argv, ranks, str(log), program)
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        with contextlib.suppress(PermissionError):  # or instants are missed on a busy machine
            os.setpriority(os.PRIO_PROCESS, 0, -15)
        running, status, failed_at = set(pids), 0, None
        limit = time.monotonic() + 300
        while running:
            for pid in sorted(running):
                done, result = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.remove(pid)
                    kill(pid)
                    if result and not status:
                        status, failed_at = os.waitstatus_to_exitcode(result), time.monotonic()
            now = time.monotonic()
            # torchrun looks every tenth of a second; the others have a little longer here.
            if (failed_at and now - failed_at > 1) or now > limit:
                status = status or forks.TIMED_OUT
                for pid in running:
                    kill(pid)
            if watch and running and watch(pids):
                watch = None
            time.sleep(0.0004 if watch else 0.01)
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        return Run(status, log.read_text(errors="replace") if log.exists() else "")

    def reference(self, *flags: str, iters: int = 6, ranks: int = 2) -> Path:
        """Checkpoints of a run that nothing happens to; made once."""
        key = (*flags, iters, ranks)
        if key not in self._references:
            path = self.new("reference")
            run = self.run(
                *S3, *flags, "--train-iters", iters, *EVERY_OTHER, "--save", path, ranks=ranks
            )
            assert run.returncode == 0, run.log[-3000:]
            self._references[key] = path
            (path / "loss").write_text(run.losses[iters])
        return self._references[key]


def kill(group: int, number: int = signal.SIGKILL) -> None:
    """Signals a rank and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def last_file(mode: str) -> str:
    """Of an iteration, before its checksums."""
    return INDEX if mode in FORMATS else "metadata.json"


def latest(folder: Path, last: str = "metadata.json") -> int:
    """The iteration that would be resumed from, 0 if none."""
    path = folder / TRACKER
    if path.exists():
        return int(path.read_text())
    complete = [p for p in folder.glob("iter_*") if (p / last).exists()]
    return int(complete[0].name[5:]) if len(complete) == 1 else 0


def loaded(run: Run) -> int:
    """The iteration that a run says it has loaded, 0 if none."""
    found = re.findall(r"successfully loaded checkpoint .* at iteration (\d+)", run.log)
    return int(found[0]) if found else 0


def trained(run: Run) -> bool:
    """Whether a step was made."""
    return re.search(r"iteration +\d+/ +\d+ \|", run.log) is not None


def error(run: Run) -> str:
    """What a run ended with: the last line of the first traceback's error."""
    found = re.findall(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Failed|Exception): .*)", run.log, re.M)
    return found[0] if found else ""


def same(one: Any, other: Any) -> bool:
    """Bitwise, tensors and objects."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (one, other)))
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dict__") and not isinstance(one, type):
        return same(vars(one), vars(other))
    return pickle.dumps(one) == pickle.dumps(other)


# (a) kill -9


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
        end = bench.reference(*_saved_at_once(mode), iters=iters)
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
        if loaded(run) != expected:
            pending.append({"at": "?", "fault": f"loaded {loaded(run)}, not {expected}"})
        if watch and watch.at:
            expected = latest(folder, last_file(mode))
            pending.append({"at": watch.at, "iteration": watch.iteration, "latest": expected})
            continue
        break
    lost = [p for p in pending if "fault" in p]
    why = lost[0]["fault"] if lost else None
    if run.returncode:
        why = why or error(run) or f"status {run.returncode}"
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
    progress(bench, row)
    if why:
        shutil.copy(bench.folder / "log.txt", bench.args.out / f"lost-{row.tried}.txt")
    shutil.rmtree(folder)


def _saved_at_once(mode: str) -> list[str]:
    """Flags of the run to compare with."""
    return SHARDED if mode == "asynchronous" else MODES[mode]


def overwrites(bench: Bench) -> list[Row]:
    """SIGKILL while another run's files of the same iteration are written over.

    What is taken for a checkpoint afterwards has to be one of the two, whole.
    """
    from megatron_s3.mcore import integrity

    rows = []
    for mode in list(MODES)[: bench.args.overwritten]:
        row = Row(f"kill -9 of all ranks, {mode} save over another")
        old = bench.reference(*_saved_at_once(mode))
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
                integrity.check(written, config=last != INDEX)
                integrity.verify(written)
            except integrity.Damaged as caught:
                row.add("survived", **what, then="refused", said=str(caught))
            else:
                found = tensors(folder, 4)
                which = [name for name, truth in zip(("old", "new"), truths, strict=True)
                         if same(found, truth)]  # fmt: skip
                row.add("survived" if which else "falsely_accepted", **what, then=" ".join(which))
            expected = latest(folder, last)
            run = resume(folder)
            if run.returncode or loaded(run) != expected:
                row.add("lost", then="not resumed", said=error(run))
            progress(bench, row)
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


# (b) signals


def signals(bench: Bench) -> list[Row]:
    """SIGTERM with Megatron's handler, SIGTERM and SIGUSR1 to the launcher."""
    rows = []
    iters = 60
    end = bench.reference(*SHARDED, iters=iters)
    few = 1 if bench.args.brief else 3
    for mode, saving in list(MODES.items())[: min(few, 2)]:
        row = Row(f"SIGTERM, --exit-signal-handler, {mode} saves")
        for victims in ((1,), (0,), (0, 1))[:few]:
            folder = bench.new("signalled")
            flags = [*S3, *saving, "--train-iters", iters, "--save-interval", 20]
            flags += ["--save", folder, "--load", folder]
            at = bench.rng.randint(3, 30)
            first = bench.run(*flags, "--exit-signal-handler", watch=_Signal(bench, victims, at))
            saved = latest(folder)
            second = bench.run(*flags)
            ok = (
                first.returncode == second.returncode == 0
                and 0 < saved < iters
                and loaded(second) == saved
                and same(tensors(folder, iters), tensors(end, iters))
            )
            what = {"ranks": list(victims), "at": at, "saved": saved, "status": first.returncode}
            row.add("survived" if ok else "lost", **what, error=error(first) or error(second))
            progress(bench, row)
        rows.append(row)
    row = Row("SIGTERM, SIGUSR1 to megatron-s3 launch")
    for number in (signal.SIGTERM, signal.SIGUSR1)[: None if bench.args.launches else 0]:
        row.add(**_launched(bench, number))
        progress(bench, row)
    return [*rows, row] if row.tried else rows


class _Signal:
    def __init__(self, bench: Bench, ranks: tuple[int, ...], at: int) -> None:
        self._log, self._ranks, self._at = bench.folder / "log.txt", ranks, at

    def __call__(self, pids: list[int]) -> bool:
        with contextlib.suppress(OSError):
            if re.search(rf"iteration +{self._at}/", self._log.read_text(errors="replace")):
                for rank in self._ranks:
                    os.kill(pids[rank], signal.SIGTERM)
                return True
        return False


def _launched(bench: Bench, number: signal.Signals) -> dict:
    """A launch that is signalled and started again, beside one that is not."""
    ends, statuses, saved = [], [], 0
    for signalled in (True, False):
        folder = bench.new("launched")
        command = [sys.executable, "-m", "megatron_s3.cli", "launch", "tiny-s3"]
        command += ["--run-dir", str(folder)]
        command += ["--set", "train_iters=40", "--set", "save_interval=20"]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            if signalled and re.search(r"iteration +7/", line):
                process.send_signal(number)
        statuses.append(process.wait())
        if signalled:
            saved = latest(folder / "checkpoints")
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            statuses.append(done.returncode)
        ends.append(folder / "checkpoints")
    ok = statuses == [75, 0, 0] and 0 < saved < 40 and same(*(tensors(e, 40) for e in ends))
    return {
        "outcome": "survived" if ok else "lost",
        "signal": number.name,
        "statuses": statuses,
        "saved": saved,
    }


# (c) a full disk


def full_disk(bench: Bench) -> list[Row]:
    """A save for which there is not enough room, by more and by less, in a small tmpfs."""
    mount = bench.new("disk")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mount], capture_output=True, text=True
    )
    if made.returncode:
        print(f"full_disk: left out, nothing can be mounted here: {made.stderr.strip()}")
        return []
    try:
        return [_full(bench, mount, mode) for mode in MODES]
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def _full(bench: Bench, mount: Path, mode: str) -> Row:
    row = Row(f"disk full in a{'n' * (mode[0] == 'a')} {mode} save")
    end = bench.reference(*_saved_at_once(mode))
    page = 4096
    one = end / "iter_0000004"
    data = sum(-(-f.stat().st_size // page) for f in one.glob("*.distcp"))
    index = -(-(one / ".metadata").stat().st_size // page)
    rooms = {
        "a part of the data": data // 2,
        "nothing fits": 0,
        "all but the last page of data": data - 1,
        "the data, a part of the index": data + index // 2,
        "no metadata.json": data + index,
        "no checksums": data + index + 1,
        "no tracker file": data + index + 2,
    }
    if last_file(mode) == INDEX:  # here they come in another order
        rooms = dict(list(rooms.items())[:4]) | {"no tracker file": data + index}
        rooms["no checksums"] = data + index + 1
    for name, pages in list(rooms.items())[: bench.args.disks]:
        folder = mount / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copytree(end / "iter_0000002", folder / "iter_0000002")
        (folder / TRACKER).write_text("2")
        flags = [*S3, *MODES[mode], "--train-iters", 6, *EVERY_OTHER]
        flags += ["--save", folder, "--load", folder]
        filler = mount / "filler"
        with open(filler, "wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(page))
            file.truncate(max(0, file.tell() - pages * page))
        first = bench.run(*flags)
        filler.unlink()
        left = latest(folder)
        second = bench.run(*flags)
        said = error(first)
        ok = (
            first.returncode != 0
            and str(folder) in said
            and "No space left on device" in said
            and left in (2, 4)
            and loaded(second) == left
            and second.returncode == 0
            and same(tensors(folder, 6), tensors(end, 6))
        )
        what = {"room": name, "latest": left, "said": said, "then": error(second)}
        row.add("survived" if ok else "lost", **what)
        progress(bench, row)
    return row


# (d) damaged files


def flips(bench: Bench) -> list[Row]:
    """Single bits, in every file; and what a loader that compares nothing makes of them."""
    from megatron_s3.mcore import checkpoint, integrity

    rows = []
    kinds = list(itertools.product(FORMATS, (True, False)))
    # The last stays: its tracker file is looked at.
    for format, sealed in reversed(kinds[: bench.args.formats]):
        work = bench.new("flipped") / "run"
        shutil.copytree(bench.reference(*FORMATS[format]), work)
        folder = work / "iter_0000006"
        if not sealed:
            (folder / integrity.SEAL).unlink()
        truth = _everything(folder)
        files = sorted(f for f in folder.iterdir() if f.is_file())
        if not sealed:
            files = [f for f in files if f.name in (".metadata", "metadata.json")]
        for path in files:
            name = f"{format}'s {path.name}" + ("" if sealed else ", no checksums.sha256")
            row = Row(f"a bit of {name}")
            data = path.read_bytes()
            count = min(bench.args.flips, len(data) * 8)
            for bit in sorted(bench.rng.sample(range(len(data) * 8), count)):
                with _flipped(path, data, bit):
                    row.add(**_judge(folder, path, truth, format), bit=bit)
            row.count("how")
            unseen = sum(t.get("unchecked") == "different" for t in row.tries)
            row.notes += f"; torch alone loads other values of {unseen}" if unseen else ""
            row.tries = [t for t in row.tries if t["how"] != "refused by name"]
            progress(bench, row)
            rows.append(row)
    row = Row(f"a bit of {TRACKER}")
    path = work / TRACKER
    data = path.read_bytes()
    for bit in range(len(data) * 8):
        with _flipped(path, data, bit):
            try:
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    checkpoint._say_once.cache_clear()
                    chosen = checkpoint._choose(work, argparse.Namespace(ckpt_step=None)).folder
                how = f"another complete iteration ({chosen.name}), and it is said"
                ok = (
                    chosen.name != "iter_0000006" and "newer ones are complete: " in said.getvalue()
                )
                outcome = "survived" if ok else "falsely_accepted"
            except integrity.Damaged as caught:
                how = "refused by name" if str(path) in str(caught) else "refused without name"
                outcome = "survived" if "by" in how else "lost"
            row.add(outcome, bit=bit, how=how)
    row.count("how")
    progress(bench, row)
    return [*rows, row]


@contextlib.contextmanager
def _flipped(path: Path, data: bytes, bit: int) -> Iterator[None]:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        file.write(bytes([data[bit // 8] ^ (1 << bit % 8)]))
    try:
        yield
    finally:
        path.write_bytes(data)


def _everything(folder: Path) -> dict[str, Any]:
    """All that a checkpoint holds, as torch reads it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from megatron_s3.mcore import objects

    found: dict[str, Any] = tensors(folder.parent, int(folder.name[5:]))
    index = dcp.FileSystemReader(folder).read_metadata()
    for key, place in index.storage_data.items():
        if not isinstance(index.state_dict_metadata[key.fqn], TensorStorageMetadata):
            with open(folder / place.relative_path, "rb") as file:
                file.seek(place.offset)
                found[key.fqn] = objects.load(io.BytesIO(file.read(place.length)))
    return found


def _judge(folder: Path, path: Path, truth: dict[str, Any], format: str) -> dict[str, str]:
    from megatron_s3.mcore import integrity

    def read() -> str:
        try:
            return "equal" if same(_everything(folder), truth) else "different"
        except (Exception, CheckpointException) as caught:  # the latter is a BaseException
            return type(caught).__name__

    try:
        integrity.check(folder, config=format == "torch_dist")
        for share in range(2):
            integrity.verify(folder, share, 2)
    except integrity.Damaged as caught:
        if path.name in str(caught):
            return {"outcome": "survived", "how": "refused by name", "unchecked": read()}
        return {"outcome": "lost", "how": f"refused by another name: {caught}"}
    as_read = read()
    if as_read == "equal":
        return {"outcome": "survived", "how": "harmless", "unchecked": as_read}
    if as_read != "different":  # not by name, but nothing is loaded
        return {"outcome": "survived", "how": f"fails in the loader ({as_read})"}
    return {"outcome": "falsely_accepted", "how": "accepted"}


def reading(bench: Bench) -> list[Row]:
    """What comparing the checksums costs: the same files read plainly, verified, and by torch."""
    from megatron_s3.mcore import integrity

    folder = bench.new("large") / "iter_0000001"
    path = folder / "mp_rank_00/model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save([torch.randn(16 << 20) for _ in range(bench.args.megabytes // 64)], path)
    size = path.stat().st_size

    def plain() -> None:
        buffer = bytearray(4 << 20)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    ways: dict[str, Callable[[], Any]] = {
        "read": plain,
        "verified": lambda: integrity.verify(folder),
        "torch.load": lambda: torch.load(path, weights_only=True),
    }
    best = dict.fromkeys(ways, 0.0)
    plain()
    row = Row(f"none: {size / 1e9:.2f} GB from memory, 1 thread, best of 5")
    for _ in range(5):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            best[name] = max(best[name], size / 1e9 / (time.perf_counter() - began))
    row.notes = ", ".join(f"{name} {speed:.2f} GB/s" for name, speed in best.items())
    progress(bench, row)
    return [row]


def damage(bench: Bench) -> list[Row]:
    """Each file missing, cut short, or with a bit flipped: the trainer says one thing, and ends."""
    rows = []
    cases = {
        "torch_dist": [INDEX, "metadata.json", "__0_0.distcp", "__1_0.distcp", TRACKER],
        "torch": ["mp_rank_00/model_optim_rng.pt", "mp_rank_00/distrib_optim.pt"],
        "fsdp_dtensor": [INDEX, "__0_0.distcp", "__1_0.distcp", TRACKER],
        "torch_dcp": [INDEX, "__0_0.distcp", "__1_0.distcp", TRACKER],
    }
    files = [(format, name) for format, names in cases.items() for name in names]
    for how in ("missing", "bits flipped", "cut short", "empty")[: bench.args.files]:
        row = Row(f"file {how}: the trainer")
        for format, name in files[: bench.args.files]:
            saving = FORMATS.get(format, [*SHARDED, "--ckpt-format", "torch"])
            work = bench.new("damaged") / "run"
            shutil.copytree(bench.reference(*saving), work)
            path = work / name if name == TRACKER else work / "iter_0000006" / name
            data = path.read_bytes()
            if how == "missing":
                path.unlink()
            else:
                new = bytearray(data)
                for at in range(len(new) // 2, min(len(new) // 2 + 128, len(new))):
                    new[at] ^= 16  # padding, between tensors, has up to 63 bytes
                cut = {"cut short": data[: len(data) * 2 // 3], "empty": b"", "bits flipped": new}
                path.write_bytes(cut[how])
            before = {f: f.stat().st_mtime_ns for f in work.rglob("*")}
            flags = [*saving, "--train-iters", 8, *EVERY_OTHER]
            run = bench.run(*S3, *flags, "--load", work, "--save", work)
            said = error(run)
            untouched = before == {f: f.stat().st_mtime_ns for f in work.rglob("*")}
            named = path.name in said and run.returncode not in (0, forks.TIMED_OUT)
            outcome = "survived" if named and untouched and not trained(run) else "lost"
            if trained(run):
                outcome = "falsely_accepted"
            if outcome != "survived":
                (bench.args.out / f"damage-{how}-{format}.txt").write_text(run.log)
            row.add(outcome, file=f"{format}: {name}", said=said, status=run.returncode)
            progress(bench, row)
            shutil.rmtree(work)
        rows.append(row)
    return rows


# (e) gradients


def gradients(bench: Bench) -> list[Row]:
    """Spoiled on rank 1 before they are reduced, in one step or in five."""
    iters, at = 60, 20
    rows: list[Row] = []
    optimizers = {
        "s3": S3,
        "s3, grad bound 10": [*S3, "--s3-grad-bound", "10"],
        "adamw, clip 1.0": ["--optimizer", "adamw"],
        "adamw, no clip": ["--optimizer", "adamw", "--clip-grad", "0"],
    }
    schedule = ["--train-iters", iters, "--lr-warmup-iters", 5, "--lr", "3e-3", "--bf16"]
    schedule += ["--use-distributed-optimizer", "--save-interval", iters]
    unchecked = ["--no-check-for-nan-in-loss-and-grad"]
    for name, flags in list(optimizers.items())[: bench.args.optimizers]:
        normal = bench.run(*flags, *schedule).losses
        for value in ("nan", "inf", "1e30", "x1000")[: bench.args.optimizers]:
            for checked in (False, True)[: bench.args.optimizers]:
                row = Row(f"{name}: {value} on one rank{'' if checked else ', unchecked'}")
                save = bench.new("gradients")
                run = bench.run(
                    *flags, *schedule, *([] if checked else unchecked), "--save", save,
                    hook=f"{value}@{at}-{at}",
                )  # fmt: skip
                row.add(**_spoiled(run, normal, save, at, iters))
                row.notes = row.tries[0]["how"]
                progress(bench, row)
                rows.append(row)
    rows.append(_storm(bench))
    return rows


def _spoiled(run: Run, normal: dict[int, str], save: Path, at: int, iters: int) -> dict:
    nans = states = 0  # values that are not finite, of parameters and of the state
    if saved := latest(save):
        for name, tensor in tensors(save, saved).items():
            count = int((~tensor.isfinite()).sum())
            if re.search(r"\.exp_|momentum", name):
                states += count
            else:
                nans += count
    said = re.findall(
        r"number of nan iterations: +[1-9]|lm loss: NAN|lm loss of iteration \d+ is not finite",
        run.log,
    )
    if run.returncode:
        # Megatron's rerun state machine repeats the step, saves what was before it, and exits.
        found = re.findall(
            r"Unexpected result (\S+) on rank (\d+) .*?message='(.*?)( for|')", run.log
        )
        why = f"rank {found[0][1]}: {found[0][2]}" if found else error(run)[:100]
        how = f"said and ended with status {run.returncode}, iteration {saved} saved ({why})"
        ok = why and saved == at - 1 and not nans
        return {"outcome": "survived" if ok else "lost", "how": how, "nans": nans}
    worse = {
        i: float(loss) - float(normal[i])
        for i, loss in run.losses.items()
        if i > at and i in normal
    }
    largest = max(worse.values(), default=0.0)
    back = next((i for i in sorted(worse) if all(worse[j] < 0.02 for j in worse if j >= i)), None)
    if nans or iters not in worse:
        how = f"{nans:,} values of the checkpoint not finite; " + (
            f"the log says {said[0]!r}" if said else "the log does not say so"
        )
    elif back:
        how = f"loss at most {largest:+.3f}, back within 0.02 after {back - at} steps"
    else:
        how = f"loss at most {largest:+.3f}, {worse[iters]:+.3f} at the end"
    if states and not nans:
        how += f"; {states:,} values of the state are not finite, parameters all are"
    silent = (nans or iters not in worse) and not said
    return {"outcome": "falsely_accepted" if silent else "survived", "how": how}


def _storm(bench: Bench) -> Row:
    row = Row("fp16: inf on one rank in 5 steps")
    for name, flags in {"sharded": ["--use-distributed-optimizer"], "whole": []}.items():
        save = bench.new("storm")
        run = bench.run(
            *S3, "--fp16", "--initial-loss-scale", 1024, "--hysteresis", 1, *flags,
            "--train-iters", 12, "--save", save, "--save-interval", 1, hook="inf@5-9",
        )  # fmt: skip
        skipped = [int(n) for n in re.findall(r"skipped iterations: +(\d+)", run.log)]
        states = [tensors(save, i) for i in range(4, 13)] if latest(save) == 12 else []
        # The loss scale is among what is saved, but not among the tensors.
        still = all(same(states[0], s) for s in states[1:6])
        moves = [not same(a, b) for a, b in itertools.pairwise(states[5:])]
        ok = run.returncode == 0 and skipped[4:9] == [1] * 5 and states and still and all(moves)
        row.add("survived" if ok else "lost", layout=name, skipped=skipped, moves=moves)
        progress(bench, row)
    row.notes = "skipped on both ranks, state and parameters bitwise as before, then on"
    return row


# (f) what does not fit


def misfits(bench: Bench) -> list[Row]:
    """Another world size, p, beta, optimizer or version."""
    whole = [*SHARDED, "--dist-ckpt-optim-fully-reshardable"]
    whole += ["--attention-dropout", "0", "--hidden-dropout", "0"]
    whole += ["--untie-embeddings-and-output-weights"]
    source = bench.reference(*whole)
    rows = []
    row = Row("another world size, --dist-ckpt-optim-fully-reshardable")
    layouts = {
        "2 -> 1": (1, []),
        "2 -> 4": (4, []),
        "2 -> tensor 2": (2, ["--tensor-model-parallel-size", "2"]),
    }
    for name, (ranks, flags) in list(layouts.items())[: bench.args.misfits]:
        save = bench.new("resharded")
        at_once = ["--ckpt-convert-format", "torch_dist", "--ckpt-convert-save", save]
        run = bench.run(
            *S3, *whole, *flags, "--train-iters", 6, "--load", source, "--ckpt-step", 4, *at_once,
            ranks=ranks,
        )  # fmt: skip
        ok = run.returncode == 0 and same(tensors(save / "torch_dist", 4), tensors(source, 4))
        row.add("survived" if ok else "lost", layout=name, error=error(run))
        progress(bench, row)
    rows.append(row)
    rows += _plain_resharding(bench)
    row = Row("another p, optimizer, version")
    adamw, newer, older = (bench.new(name) for name in ("adamw", "newer", "older"))
    made = {newer: (S3, "format=2"), older: (S3, "format=none"), adamw: (ADAMW, "")}
    for folder, (optimizer, hook) in list(made.items())[: bench.args.misfits]:
        flags = [*optimizer, *SHARDED, "--train-iters", 6, *EVERY_OTHER, "--save", folder]
        bench.run(*flags, hook=hook)
    ours = bench.reference(*SHARDED)
    cases = {
        "a newer format": (newer, S3, "format 2: this one knows formats up to 1"),
        "no format, of an older version": (older, S3, None),
        "another p": (ours, [*S3, "--s3-p", "2"], "saved with --s3-p 3.0"),
        "another beta": (ours, [*S3, "--s3-beta", "0.9"], None),
        "AdamW's into S3": (adamw, S3, "saved by --optimizer adamw"),
        "S3's into AdamW": (ours, ["--optimizer", "adamw"], "saved by --optimizer s3"),
        "S3's into Megatron's Adam": (ours, ["--optimizer", "adam"], "saved by --optimizer s3"),
        "a newer format, weights alone": (newer, [*S3, "--no-load-optim"], None),
    }
    for name, (folder, flags, refused) in list(cases.items())[: bench.args.misfits]:
        run = bench.run(*flags, *SHARDED, "--train-iters", 6, "--load", folder, "--ckpt-step", 4)
        said = error(run)
        if refused:
            ok = refused in said and str(folder) in said and not trained(run) and run.returncode
            outcome = "survived" if ok else "falsely_accepted" if trained(run) else "lost"
        else:
            ok = run.returncode == 0 and loaded(run) == 4
            ok &= name != "another beta" or any(
                "from here on it is beta=0.9" in s for s in run.said
            )
            outcome = "survived" if ok else "lost"
        row.add(outcome, case=name, said=said)
        progress(bench, row)
    return [*rows, row]


def _plain_resharding(bench: Bench) -> list[Row]:
    """Megatron's default format: the data-parallel size may change, the rest is refused."""
    row = Row("another world size, dp_reshardable")
    dry = ["--attention-dropout", "0", "--hidden-dropout", "0"]
    source = bench.reference(*SHARDED, *dry)
    for name, (ranks, flags, refused) in list(
        {
            "2 -> 1": (1, [], None),
            "2 -> 4": (4, [], None),
            "2 -> tensor 2": (2, ["--tensor-model-parallel-size", "2"], "(TP, PP) mismatch"),
        }.items()
    )[: bench.args.misfits]:
        run = bench.run(
            *S3, *SHARDED, *dry, *flags, "--train-iters", 6, "--load", source, "--ckpt-step", 2,
            ranks=ranks,
        )  # fmt: skip
        if refused:
            ok = refused in error(run) and not trained(run)
        else:
            apart = abs(float(run.losses.get(6, "inf")) - float((source / "loss").read_text()))
            ok = run.returncode == 0 and loaded(run) == 2 and apart < 1e-3
        row.add("survived" if ok else "lost", layout=name, error=error(run))
        progress(bench, row)
    return [row]


# In a rank


def as_rank(hook: str) -> None:
    """Runs the trainer with something wrong: VALUE@FROM-TO (gradients on rank 1), format=NUMBER."""
    what, _, when = hook.partition("@")
    if when:
        _spoil(what, *map(int, when.split("-")))
    else:
        _stamp(hook.partition("=")[2])
    runpy.run_module(forks.TRAINER, run_name="__main__", alter_sys=True)


def _spoil(what: str, first: int, last: int) -> None:
    """Before gradients are reduced."""
    from megatron.training import get_args, training

    original = training.finalize_model_grads

    def finalize_model_grads(model: list[Any], *args: Any, **kwargs: Any) -> Any:
        if first <= get_args().curr_iteration + 1 <= last and os.environ["RANK"] == "1":
            for chunk in model:
                for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                    if what.startswith("x"):
                        buffer.grad_data.mul_(float(what[1:]))
                    else:
                        buffer.grad_data[::1009] = float(what)
        return original(model, *args, **kwargs)

    training.finalize_model_grads = finalize_model_grads


def _stamp(number: str) -> None:
    """Saves as another version does."""
    from megatron.training import checkpointing

    original = checkpointing.generate_state_dict

    def generate_state_dict(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        result = original(args, *rest, **kwargs)
        result["args"] = argparse.Namespace(**vars(args))
        if number == "none":
            del result["args"].s3_format
        else:
            result["args"].s3_format = int(number)
        return result

    checkpointing.generate_state_dict = generate_state_dict


# The command

FAULTS = {
    f.__name__: f
    for f in (kills, overwrites, signals, full_disk, flips, damage, reading, gradients, misfits)
}


def progress(bench: Bench, row: Row) -> None:
    """One line on the terminal; of what went wrong, another."""
    bad = f", {row.lost} lost, {row.falsely_accepted} falsely accepted"
    print(
        f"[{time.strftime('%H:%M:%S')}] {row.fault}: {row.survived} of {row.tried}"
        + (bad if row.lost or row.falsely_accepted else ""),
        flush=True,
    )
    if row.tries and row.tries[-1]["outcome"] != "survived":
        print("   ", row.tries[-1], flush=True)


def table(rows: list[dict]) -> str:
    """The rows as text."""
    head = ("fault", "tried", "survived", "lost", "falsely accepted", "what was seen")
    keys = ("fault", "tried", "survived", "lost", "falsely_accepted", "notes")
    cells = [head, *(tuple(str(row[k]) for k in keys) for row in rows)]
    total = [sum(row[k] for row in rows) for k in keys[1:5]]
    cells.append(("all", *map(str, total), ""))
    widths = [max(len(c[i]) for c in cells) for i in range(5)]
    lines = [
        f"{c[0]:<{widths[0]}}  "
        + "  ".join(f"{c[i]:>{widths[i]}}" for i in range(1, 5))
        + f"  {c[5]}"
        for c in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Runs the command."""
    if sys.argv[1:2] == ["--as-rank"]:
        hook = sys.argv[2]
        del sys.argv[1:3]
        as_rank(hook)
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="NAME",
                        help=f"of {', '.join(FAULTS)}")  # fmt: skip
    parser.add_argument("--kills", type=int, default=12, help="of each kind, a third in steps")
    parser.add_argument("--flips", type=int, default=200, help="bits of each file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--brief", action="store_true", help="a little of each, for CI")
    parser.add_argument("--again", action="store_true", help="also what has been done")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--scratch", type=Path, help="folder for the runs (default: in --out)")
    args = parser.parse_args()
    args.launches = not args.brief
    args.megabytes = 64 if args.brief else 1024
    # How many of the cases of a fault.
    few = (2, 1, 1, 1, 2, 1) if args.brief else (99,) * 6
    args.files, args.disks, args.misfits, args.optimizers, args.formats, args.overwritten = few
    if args.brief:
        args.kills, args.flips = 1, 20
    settings = {k: getattr(args, k) for k in ("kills", "flips", "seed", "brief")}

    sys.argv[1:] = []
    import megatron_s3

    megatron_s3.register()
    forks.import_needed()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "faults.json"
    record = json.loads(path.read_text()) if path.exists() else {"faults": {}}
    scratch = (args.scratch or args.out).resolve() / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    bench = Bench(scratch, args)
    for name in args.only:
        found = record["faults"].get(name)
        if found and found["settings"] == settings and not args.again:
            continue
        began = time.monotonic()
        bench.rng.seed(f"{args.seed} {name}")
        rows = FAULTS[name](bench)
        record["faults"][name] = {
            "settings": settings,
            "seconds": round(time.monotonic() - began),
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "rows": [asdict(row) for row in rows],
        }
        record["machine"] = (
            f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}"
        )
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1).replace(f"{scratch}/", "") + "\n")
        part.replace(path)
    shutil.rmtree(scratch, ignore_errors=True)
    rows = [
        row for name in FAULTS if name in record["faults"] for row in record["faults"][name]["rows"]
    ]
    text = table(rows)
    (args.out / "faults.txt").write_text(text + "\n")
    print(text)
    return int(any(row["lost"] or row["falsely_accepted"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
