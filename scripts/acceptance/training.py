"""Megatron's own trainer with ``--optimizer s3`` on the GPUs: trains, resumes bitwise.

All runs are deterministic ones of a small GPT in bf16 with the distributed optimizer, on one rank
and, where there are more GPUs, on one rank for each.
"""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.acceptance.environment import installed
from scripts.acceptance.rows import Writer

__all__ = ["ITERATIONS", "Run", "check", "different", "missing", "train"]

ITERATIONS = 8
#: Seconds until a launch is ended.
PATIENCE = 150

_MODEL = {
    "cuda": "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 "
    "--max-position-embeddings 256 --micro-batch-size 2",
    "cpu": "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 2",
}
# Dropout stays on, so that a resume has to bring the random numbers' state back as well.
_REST = (
    "--lr 3e-3 --min-lr 3e-4 --lr-warmup-iters 2 --lr-decay-style cosine --weight-decay 0.01 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 511 --log-interval 1 --eval-iters 1 "
    "--eval-interval 1000 --bf16 --use-distributed-optimizer --save-interval 4"
)
#: Layers of torch's own operations, which need neither Transformer Engine nor Apex nor a compiler.
_LOCAL = (
    "--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--no-persist-layer-norm --no-bias-gelu-fusion --no-bias-dropout-fusion"
)
_DETERMINISTIC = {
    "NCCL_ALGO": "Ring",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


@dataclass(frozen=True)
class Run:
    """A launch that ended.

    Attributes:
        problem: why it failed, or None.
        losses: by iteration, as printed.
        log: what all ranks printed.
    """

    problem: str | None
    losses: dict[int, float]
    log: str


def missing() -> str | None:
    """What of Megatron is not there, or None."""
    if not installed("megatron-core"):
        return "megatron-core is not installed"
    return None


def train(
    log: Path,
    device: str,
    ranks: int,
    *flags: str | Path,
    impl: str = "local",
    resume: bool = False,
) -> Run:
    """One launch of the trainer.

    Args:
        log: file for what it prints.
        device: "cuda" or "cpu".
        ranks: number of processes, one for each GPU.
        *flags: added to those of the model.
        impl: "local", or Transformer Engine's layers where they are the default.
        resume: whether it begins at iteration 4.
    """
    words = [*_MODEL[device].split(), *_REST.split()]
    words += ["--global-batch-size", str(8 if ranks in (1, 2, 4, 8) else 2 * ranks)]
    words += ["--train-iters", str(ITERATIONS), "--optimizer", "s3", "--s3-device", device]
    if impl == "local":
        words += _LOCAL.split()
    words += ["--deterministic-mode", *map(str, flags)]
    environment = {
        **os.environ,
        **_DETERMINISTIC,
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine, whatever its name resolves to
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # a SLURM step's, say
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "megatron_s3.pretrain_gpt", *words]
    problem = None
    with log.open("w", encoding="utf-8") as file:
        launch = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            launch.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            problem = f"did not end within {PATIENCE} s"
            launch.send_signal(signal.SIGTERM)  # torchrun then ends its ranks
            try:
                launch.wait(20)
            except subprocess.TimeoutExpired:
                launch.kill()
    text = log.read_text(encoding="utf-8", errors="replace")
    losses = {
        int(i): float(loss)
        for i, loss in re.findall(r"iteration +(\d+)/.*?lm loss: ([-\w.+]+)", text)
    }
    if problem is None and launch.returncode:
        errors = re.findall(r"^(?:\[rank\d+\]: ?)?(\w+(?:Error|Moved|Exception): .*)", text, re.M)
        errors = [error for error in errors if not error.startswith("ChildFailedError")]
        last = errors[0] if errors else f"exit status {launch.returncode}"
        problem = f"{last[:250]} (see {log.name})"
    expected = set(range(5 if resume else 1, ITERATIONS + 1))
    if problem is None and not expected <= set(losses):
        problem = f"printed losses of {sorted(losses)} alone"
    if problem is None and not all(0 < loss < 100 for loss in losses.values()):
        problem = f"losses {losses}"
    return Run(problem, losses, text)


def different(one: Path, other: Path, iteration: int = ITERATIONS) -> str | None:
    """What differs between two checkpoints, bit for bit; None if nothing does.

    Args:
        one, other: folders that ``--save`` was given.
        iteration: which checkpoint of both.
    """
    first, second = _tensors(one, iteration), _tensors(other, iteration)
    if first.keys() != second.keys():
        return f"they hold other tensors: {sorted(first.keys() ^ second.keys())[:3]}"
    if not any("exp_pnorm" in name for name in first):
        return "there is no state of S3 in them"
    names = [
        name
        for name, tensor in first.items()
        if not torch.equal(
            tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8)
        )
    ]
    if names:
        return f"{len(names)} of {len(first)} tensors differ, the first is {names[0]}"
    return None


def _tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder / f"iter_{iteration:07d}")
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def check(writer: Writer, device: str, folder: Path) -> None:
    """Rows of launches, for one rank and for one rank a GPU."""
    if why := missing():
        writer.skipped("the trainer", why)
        return
    worlds = [1]
    if device == "cpu":
        writer.skipped("2 and more ranks", "a rehearsal takes one")
    elif torch.cuda.device_count() > 1:
        worlds.append(torch.cuda.device_count())
    else:
        writer.skipped("2 and more ranks", "there is one GPU, and NCCL takes one rank a GPU")
    for ranks in worlds:
        _world(writer, device, folder, ranks)
    if device == "cpu":
        return
    if not installed("transformer_engine"):
        writer.skipped("layers of Transformer Engine", "it is not installed")
        return
    run = train(folder / "te.txt", device, worlds[-1], impl="te")
    _trained(writer, "layers of Transformer Engine", run)


def _world(writer: Writer, device: str, folder: Path, ranks: int) -> None:
    name = f"{ranks} rank{'s' if ranks > 1 else ''}"
    through, resumed, portable = (
        folder / f"{what}-{ranks}" for what in ("through", "resumed", "portable")
    )

    def launch(what: Path, *flags: str | Path, resume: bool = False) -> Run:
        log = what.with_suffix(".txt")
        return train(log, device, ranks, "--save", what, *flags, resume=resume)

    one = launch(through)
    if not _trained(writer, f"{name} train", one):
        return
    kernel = "torch operations" not in one.log
    if kernel:
        writer.passed(f"{name}: the kernel steps", "no line says that the portable path is taken")
    else:
        line = re.search(r".*torch operations.*", one.log)
        writer.row(
            f"{name}: the kernel steps", "failed" if device == "cuda" else "skipped", line[0]
        )
    two = launch(resumed, "--load", through, "--ckpt-step", "4", resume=True)
    _equal(writer, f"{name}: resume", two, through, resumed)
    if device == "cuda":
        three = launch(portable, "--s3-no-fused")
        _equal(writer, f"{name}: kernel = portable step", three, through, portable)


def _trained(writer: Writer, what: str, run: Run) -> bool:
    if run.problem:
        writer.failed(what, run.problem)
        return False
    first, last = run.losses[1], run.losses[ITERATIONS]
    if last >= first:
        writer.failed(what, f"the loss goes from {first:.4f} to {last:.4f} nats", losses=run.losses)
        return False
    writer.passed(what, f"loss {first:.4f} to {last:.4f} nats", losses=run.losses)
    return True


def _equal(writer: Writer, what: str, run: Run, one: Path, other: Path) -> None:
    if run.problem:
        writer.failed(what, run.problem)
    elif found := different(one, other):
        writer.failed(what, found)
    else:
        writer.passed(what, f"bitwise: all that is saved after {ITERATIONS} iterations")
