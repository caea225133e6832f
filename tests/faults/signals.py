"""SIGTERM and SIGUSR1 to ranks and to the launcher."""

import contextlib
import os
import re
import signal
import subprocess
import sys

from tests.faults.bench import MODES, S3, SHARDED, Bench, latest
from tests.faults.rows import Row
from tests.harness.tensors import same, tensors
from tests.harness.trainer import REPOSITORY

__all__ = ["signals"]


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
                and second.loaded == saved
                and same(tensors(folder, iters), tensors(end, iters))
            )
            what = {"ranks": list(victims), "at": at, "saved": saved, "status": first.returncode}
            row.add("survived" if ok else "lost", **what, error=first.error or second.error)
            row.progress()
        rows.append(row)
    row = Row("SIGTERM, SIGUSR1 to megatron-s3 launch")
    for number in (signal.SIGTERM, signal.SIGUSR1)[: None if bench.args.launches else 0]:
        row.add(**_launched(bench, number))
        row.progress()
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
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            if signalled and re.search(r"iteration +7/", line):
                process.send_signal(number)
        statuses.append(process.wait())
        if signalled:
            saved = latest(folder / "checkpoints")
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
            statuses.append(done.returncode)
        ends.append(folder / "checkpoints")
    ok = statuses == [75, 0, 0] and 0 < saved < 40 and same(*(tensors(e, 40) for e in ends))
    return {
        "outcome": "survived" if ok else "lost",
        "signal": number.name,
        "statuses": statuses,
        "saved": saved,
    }
