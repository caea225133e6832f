"""Megatron's real trainer on a tiny GPT, on as many CPU ranks as asked for."""

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.harness.forks import Forks

REPOSITORY = Path(__file__).parents[2]


def brief(cases: Iterable[str], *kept: str) -> list[Any]:
    """Parameters of a test of which every run takes those kept, `-m thorough` the others."""
    cases = list(cases)
    assert set(kept) <= set(cases)
    thorough = pytest.mark.thorough
    return [case if case in kept else pytest.param(case, marks=thorough) for case in cases]


#: 2 layers, 120,576 parameters, 8 sequences of 64 made-up tokens a step.
TINY = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64
--max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8 --lr 3e-3
--lr-warmup-iters 2 --lr-decay-style cosine --weight-decay 0.01 --mock-data
--tokenizer-type NullTokenizer --vocab-size 255 --log-interval 1
--eval-iters 1 --eval-interval 1000""".split()
PARAMETERS = 120_576
ITERATIONS = 6
TRAINER = ("-m", "megatron_s3.pretrain_gpt")


@dataclass
class Run:
    """A finished training run.

    Attributes:
        returncode: of torchrun.
        log: what all ranks printed.
    """

    returncode: int
    log: str

    @property
    def losses(self) -> dict[int, str]:
        """Losses as printed (7 digits), by iteration.

        The second line after a start or a resume is left out: Megatron prints there the mean of
        the first two iterations.
        """
        found = re.findall(r"iteration +(\d+)/.*?lm loss: ([\d.E+-]+)", self.log)
        return {int(i): loss for n, (i, loss) in enumerate(found) if n != 1}

    @property
    def said(self) -> list[str]:
        """The lines of the plugin, without its name."""
        return re.findall(r"^\[megatron_s3\] (.*)", self.log, re.MULTILINE)

    @property
    def error(self) -> str:
        """The last line of the first traceback, or the line that refuses the arguments."""
        line = r"^(?:\[rank\d+\]: )?((?:\w*(?:Error|Moved)|error): .*)"
        found = re.findall(line, self.log, re.MULTILINE)
        return found[0] if found else ""


def train(
    *flags: str | Path,
    ranks: int = 1,
    megatron: str | Path | None = None,
    command: tuple[str, ...] = TRAINER,
    tiny: bool = True,
    check: bool = True,
    environment: dict[str, str] | None = None,
) -> Run:
    """Trains for 6 iterations, unless the flags say otherwise.

    The ranks are forks of one process that has imported everything
    (:mod:`tests.harness.forks`), or torchrun's where another program or environment is asked
    for.

    Args:
        *flags: added to :data:`TINY`; the last of two equal flags wins.
        ranks: number of processes.
        megatron: folder of another Megatron-LM than the installed one.
        command: what torchrun starts.
        tiny: whether to add :data:`TINY` at all.
        check: fail with the end of the log unless the run ends well.
        environment: added to this process's.
    """
    schedule = ["--train-iters", str(ITERATIONS), *TINY] if tiny else []
    if command == TRAINER and not environment:
        return _fork(megatron, ranks, [*schedule, *map(str, flags)], check)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = [str(p) for p in (megatron, REPOSITORY, os.environ.get("PYTHONPATH")) if p]
    run = subprocess.run(
        [*torchrun, f"--nproc-per-node={ranks}", *command, *schedule, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        | (environment or {}),
    )
    result = Run(run.returncode, run.stdout)
    assert not check or run.returncode == 0, _why(run.stdout)
    return result


def _why(log: str) -> str:
    """The first traceback, which is seldom the last, and the end."""
    at = log.find("Traceback (most recent call last)")
    first = log[at : at + 4000] + "\n...\n" if 0 <= at < len(log) - 6000 else ""
    return first + log[-6000:]


@functools.cache
def forks(megatron: str | Path | None = None) -> Forks:
    """The process that forks ranks, by the release of Megatron."""
    return Forks(megatron)


def _fork(megatron: str | Path | None, ranks: int, argv: list[str], check: bool) -> Run:
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        result = Run(forks(megatron).run(argv, ranks, log.name), log.read())
    assert not check or result.returncode == 0, _why(result.log)
    return result


def tensors(checkpoint: Path, iteration: int | None = ITERATIONS) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint, by its name there; of the folder itself if None."""
    folder = checkpoint if iteration is None else checkpoint / f"iter_{iteration:07d}"
    reader = dcp.FileSystemReader(folder)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def assert_bitwise_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [
        name
        for name in one
        if not torch.equal(
            one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)
        )
    ]
    assert not different, different
