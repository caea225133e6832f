"""Megatron's real trainer on a tiny GPT, on as many CPU ranks as asked for."""

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import forks as _forks
from .models import ITERATIONS, PARAMETERS, TINY
from .runs import Run
from .tensors import assert_bitwise_equal, tensors

__all__ = ["ITERATIONS", "PARAMETERS", "REPOSITORY", "TINY", "TRAINER", "Run"]
__all__ += ["assert_bitwise_equal", "brief", "forks", "tensors", "train"]

REPOSITORY = Path(__file__).parents[2]
TRAINER = ("-m", _forks.TRAINER)
#: Seconds that torchrun has to end its ranks.
PATIENCE = 20
#: What a SLURM step or a launcher around this process has set for ranks of its own.
_RENDEZVOUS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def brief(cases: Iterable[str], *kept: str) -> list[Any]:
    """Parameters of a test of which every run takes those kept, `-m thorough` the others."""
    import pytest  # which a machine that trains may lack

    cases = list(cases)
    assert set(kept) <= set(cases)
    thorough = pytest.mark.thorough
    return [case if case in kept else pytest.param(case, marks=thorough) for case in cases]


def train(
    *flags: str | Path,
    ranks: int = 1,
    megatron: str | Path | None = None,
    command: tuple[str, ...] = TRAINER,
    tiny: bool = True,
    check: bool = True,
    environment: dict[str, str] | None = None,
    threads: int | None = 1,
    log: Path | None = None,
    limit: float = 0,
) -> Run:
    """Trains for 6 iterations, unless the flags say otherwise.

    The ranks are forks of one process that has imported everything
    (:mod:`tests.harness.forks`), or torchrun's where another program, environment or number of
    threads is asked for.

    Args:
        *flags: added to :data:`TINY`; the last of two equal flags wins.
        ranks: number of processes.
        megatron: folder of another Megatron-LM than the installed one.
        command: what torchrun starts.
        tiny: whether to add :data:`TINY` at all.
        check: fail with the end of the log unless the run ends well.
        environment: added to this process's.
        threads: of each rank; None: as many as torch takes by itself.
        log: the file for what all ranks print; one that is removed by default.
        limit: seconds after which the run is ended; 0: none.
    """
    words = ["--train-iters", str(ITERATIONS), *TINY] if tiny else []
    words += map(str, flags)
    with _opened(log) as path:
        if command == TRAINER and not environment and threads == 1:
            status = forks(megatron).run(words, ranks, path, limit=limit)
        else:
            status = _torchrun(
                [*command, *words], ranks, megatron, environment, threads, path, limit
            )
        run = Run(status, path.read_text(encoding="utf-8", errors="replace"))
    assert not check or run.returncode == 0, _why(run.log)
    return run


@contextlib.contextmanager
def _opened(log: Path | None) -> Iterator[Path]:
    if log is not None:
        log.write_text("")
        yield log
        return
    with tempfile.NamedTemporaryFile() as file:
        yield Path(file.name)


def _torchrun(
    words: list[str],
    ranks: int,
    megatron: str | Path | None,
    environment: dict[str, str] | None,
    threads: int | None,
    log: Path,
    limit: float,
) -> int:
    path = [str(p) for p in (megatron, REPOSITORY, os.environ.get("PYTHONPATH")) if p]
    inherited = {k: v for k, v in os.environ.items() if k not in _RENDEZVOUS}
    inherited |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore"}
    inherited |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*torchrun, *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=inherited | (environment or {}),
        )
        try:
            return process.wait(limit or None)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            return _forks.TIMED_OUT
        finally:
            process.kill()
            process.wait()


def _why(log: str) -> str:
    """The first traceback, which is seldom the last, and the end."""
    at = log.find("Traceback (most recent call last)")
    first = log[at : at + 4000] + "\n...\n" if 0 <= at < len(log) - 6000 else ""
    return first + log[-6000:]


@functools.cache
def forks(megatron: str | Path | None = None, imports: str = "megatron") -> _forks.Forks:
    """Returns the process that forks ranks, by Megatron's release and what it has imported."""
    return _forks.Forks(megatron, imports=imports)
