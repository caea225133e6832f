"""Where the runs are that things happen to, with Megatron's trainer on CPU ranks."""

import argparse
import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_s3.storage.layout import CONFIG, INDEX
from megatron_s3.storage.newest import newest
from tests.harness import forks
from tests.harness.models import TINY
from tests.harness.runs import Run

__all__ = ["ADAMW", "EVERY_OTHER", "FORMATS", "MODES", "S3", "SHARDED"]
__all__ += ["Bench", "last_file", "latest", "saved_at_once"]

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


class Bench:
    """Where the runs are, and how many of each there are.

    Ranks are forks of this process (:mod:`tests.harness.forks`).
    """

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
    ) -> Run:
        """Trains; ``watch`` is asked all the time, with the ranks' ids, until it says True.

        Args:
            *flags: of the trainer.
            ranks: number of processes.
            hook: what is wrong in the ranks; of :mod:`tests.faults.rank`.
            watch: kills or signals some of them.
        """
        log = self.folder / "log.txt"
        log.unlink(missing_ok=True)
        argv, program = [*TINY, *QUICK, *map(str, flags)], forks.TRAINER
        if hook:
            argv, program = [hook, *argv], "tests.faults.rank"
        pids = forks.start(argv, ranks, log, program)
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        with contextlib.suppress(PermissionError):  # or instants are missed on a busy machine
            os.setpriority(os.PRIO_PROCESS, 0, -15)
        # torchrun looks every tenth of a second; the others have a little longer here.
        ended = forks.wait(pids, 300, grace=1, watch=watch and (lambda: watch(pids)))
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        return Run(ended.status, log.read_text(errors="replace") if log.exists() else "")

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


def last_file(mode: str) -> str:
    """Of an iteration, before its checksums."""
    return INDEX if mode in FORMATS else CONFIG


def latest(folder: Path, last: str = CONFIG) -> int:
    """The iteration that would be resumed from, 0 if none."""
    found = newest(folder, config=last == CONFIG)
    return found if isinstance(found, int) else 0


def saved_at_once(mode: str) -> list[str]:
    """Returns the flags of the run to compare with."""
    return SHARDED if mode == "asynchronous" else MODES[mode]
