"""Megatron's own trainer with ``--optimizer s3`` on the GPUs: trains, resumes bitwise.

All runs are deterministic ones of a small GPT in bf16 with the distributed optimizer, on one rank
and, where there are more GPUs, on one rank for each.  They run side by side, once with S3's
defaults and once with what a kernel has beyond them: statistics, bounded gradients, int8 states.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from scripts.acceptance.environment import installed
from scripts.acceptance.rows import Writer
from scripts.acceptance.task import Task
from tests.harness import trainer
from tests.harness.forks import TIMED_OUT
from tests.harness.models import LOCAL, TINY
from tests.harness.runs import Run
from tests.harness.tensors import bitwise, tensors

__all__ = ["ENVIRONMENT", "ITERATIONS", "check", "different", "missing", "train"]

ITERATIONS = 8
#: Seconds until a launch is ended.
PATIENCE = 150

# Dropout stays on, so that a resume has to bring the random numbers' state back as well.
_MODEL = [
    *TINY,
    *"--min-lr 3e-4 --vocab-size 511 --bf16 --use-distributed-optimizer --save-interval 4".split(),
    *("--train-iters", str(ITERATIONS), "--optimizer", "s3"),
]
_LARGER = """--num-layers 4 --hidden-size 256 --seq-length 256
--max-position-embeddings 256""".split()
#: S3's defaults, and all that its kernel has beyond them.
_SETTINGS = {
    "": [],
    "statistics, bounded gradients, int8 states": """--plugin-log-updates --s3-grad-bound 5
    --use-precision-aware-optimizer --exp-avg-dtype fp8 --exp-avg-sq-dtype bf16""".split(),
}
ENVIRONMENT = {
    # Megatron warms up compiled functions at every start, whatever the flags: half a minute.
    "TORCHDYNAMO_DISABLE": "1",
    "NCCL_ALGO": "Ring",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # One machine, whatever its name resolves to.
    "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
}


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
) -> tuple[Run, str | None]:
    """One launch of the trainer.

    Args:
        log: file for what it prints.
        device: "cuda" or "cpu".
        ranks: number of processes, one for each GPU.
        *flags: added to those of the model.
        impl: "local", or Transformer Engine's layers where they are the default.
        resume: whether it begins at iteration 4.

    Returns:
        The run, and why it failed or None.
    """
    words = [*_MODEL, *(_LARGER if device == "cuda" else []), "--plugin-device", device]
    words += ["--global-batch-size", str(8 if ranks in (1, 2, 4, 8) else 2 * ranks)]
    words += [*(LOCAL if impl == "local" else []), "--deterministic-mode"]
    run = trainer.train(
        *words,
        *flags,
        ranks=ranks,
        tiny=False,
        check=False,
        environment=ENVIRONMENT,
        log=log,
        limit=PATIENCE,
    )
    return run, _problem(run, log, 5 if resume else 1)


def _problem(run: Run, log: Path, first: int) -> str | None:
    if run.returncode == TIMED_OUT:
        return f"did not end within {PATIENCE} s"
    if run.returncode:
        said = run.error or f"exit status {run.returncode}"
        return f"{said[:250]} (see {log.name})"
    losses = _losses(run)
    if not set(range(first, ITERATIONS + 1)) <= set(losses):
        return f"printed losses of {sorted(losses)} alone"
    return None if all(0 < loss < 100 for loss in losses.values()) else f"losses {losses}"


def _losses(run: Run) -> dict[int, float]:
    """All that were printed, the mean of the first two iterations too."""
    return {iteration: float(loss) for iteration, loss in run.column("lm loss").items()}


def different(one: Path, other: Path, iteration: int = ITERATIONS) -> str | None:
    """What differs between two checkpoints, bit for bit; None if nothing does.

    Args:
        one, other: folders that ``--save`` was given.
        iteration: which checkpoint of both.
    """
    first, second = tensors(one, iteration), tensors(other, iteration)
    if first.keys() != second.keys():
        return f"they hold other tensors: {sorted(first.keys() ^ second.keys())[:3]}"
    if not any("exp_pnorm" in name for name in first):
        return "there is no state of S3 in them"
    names = [name for name, tensor in first.items() if not bitwise(tensor, second[name])]
    if names:
        return f"{len(names)} of {len(first)} tensors differ, the first is {names[0]}"
    return None


def check(writer: Writer, task: Task) -> None:
    """Rows of launches, for one rank and for one rank a GPU."""
    if why := missing():
        writer.skipped("the trainer", why)
        return
    device = task.device
    worlds = [1]
    if device == "cpu":
        writer.skipped("2 and more ranks", "a rehearsal takes one")
    elif torch.cuda.device_count() > 1:
        worlds.append(torch.cuda.device_count())
    else:
        writer.skipped("2 and more ranks", "there is one GPU, and NCCL takes one rank a GPU")
    for ranks in worlds:
        settings = list(enumerate(_SETTINGS.items()))
        with ThreadPoolExecutor() as pool:
            for found in [
                pool.submit(_world, writer, device, task.folder / str(i), ranks, name, flags)
                for i, (name, flags) in settings
            ]:
                found.result()
    if device == "cpu":
        return
    if not installed("transformer_engine"):
        writer.skipped("layers of Transformer Engine", "it is not installed")
        return
    found = train(task.folder / "te.txt", device, worlds[-1], impl="te")
    _trained(writer, "layers of Transformer Engine", *found)


def _world(
    writer: Writer, device: str, folder: Path, ranks: int, setting: str, flags: Sequence[str]
) -> None:
    """Trains with a setting, resumes, and trains with the portable step."""
    folder.mkdir(exist_ok=True)
    name = f"{ranks} rank{'s' if ranks > 1 else ''}" + (f", {setting}" if setting else "")
    through, resumed, portable = (
        folder / f"{what}-{ranks}" for what in ("through", "resumed", "portable")
    )

    def launch(what: Path, *more: str | Path, resume: bool = False) -> tuple[Run, str | None]:
        log = what.with_suffix(".txt")
        return train(log, device, ranks, "--save", what, *flags, *more, resume=resume)

    with ThreadPoolExecutor() as pool:
        # On a CPU the kernel and the portable step are compared by the tests.
        other = pool.submit(launch, portable, "--plugin-no-fused") if device == "cuda" else None
        one, problem = launch(through)
        if not _trained(writer, f"{name} train", one, problem):
            return
        kernel = "torch operations" not in one.log
        if kernel:
            said = "no line says that the portable path is taken"
            writer.passed(f"{name}: the kernel steps", said)
        else:
            line = re.search(r".*torch operations.*", one.log)
            status = "failed" if device == "cuda" else "skipped"
            writer.row(f"{name}: the kernel steps", status, line[0])
        _, problem = launch(resumed, "--load", through, "--ckpt-step", "4", resume=True)
        _equal(writer, f"{name}: resume", problem, through, resumed)
        if other is not None:
            _, problem = other.result()
            _equal(writer, f"{name}: kernel = portable step", problem, through, portable)


def _trained(writer: Writer, what: str, run: Run, problem: str | None) -> bool:
    if problem:
        writer.failed(what, problem)
        return False
    losses = _losses(run)
    first, last = losses[1], losses[ITERATIONS]
    if last >= first:
        writer.failed(what, f"the loss goes from {first:.4f} to {last:.4f} nats", losses=losses)
        return False
    writer.passed(what, f"loss {first:.4f} to {last:.4f} nats", losses=losses)
    return True


def _equal(writer: Writer, what: str, problem: str | None, one: Path, other: Path) -> None:
    if problem := problem or different(one, other):
        writer.failed(what, problem)
    else:
        writer.passed(what, f"bitwise: all that is saved after {ITERATIONS} iterations")
