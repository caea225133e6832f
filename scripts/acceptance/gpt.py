"""The paper's GPT with 64M parameters, trained with S3 and with AdamW for as long each.

Both see the same samples and keep a constant rate after a warmup, so that the runs may end anywhere
and can be compared at any iteration that both have reached.  It is one seed at the paper's rates:
it shows that both train and how fast, not which is better.
"""

import json
import re
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread

from scripts.acceptance.environment import installed
from scripts.acceptance.rows import Writer
from scripts.acceptance.task import Task
from scripts.acceptance.training import ENVIRONMENT
from tests.harness import trainer
from tests.harness.forks import TIMED_OUT
from tests.harness.models import LOCAL
from tests.harness.runs import Run

__all__ = ["RUNS", "check", "read"]

RUNS = {
    "S3": "--optimizer s3 --lr 3e-3 --min-lr 3e-3 --weight-decay 0.01 --plugin-log-updates",
    "AdamW": "--optimizer adam --adam-beta2 0.95 --lr 3e-4 --min-lr 3e-4 --weight-decay 0.1 "
    "--clip-grad 1.0",
}
#: Layers, hidden size, heads, length, batch.
_MODEL = {"cuda": (12, 512, 8, 1024, 32), "cpu": (2, 32, 2, 64, 2)}
_FLAGS = """--tokenizer-type NullTokenizer --vocab-size 50257 --bf16 --use-distributed-optimizer
--train-iters 20000 --lr-decay-style constant --lr-warmup-iters 100 --lr-decay-iters 20000
--eval-iters 8 --eval-interval 100 --log-interval 10 --num-workers 2 --seed 1234
--init-method-std 0.02 --attention-dropout 0 --hidden-dropout 0
--no-create-attention-mask-in-dataloader""".split()
#: Seconds that the end of a run takes.
_END = 10
_VALIDATION = re.compile(r"validation loss at iteration (\d+).*?lm loss value: ([-\w.+]+)")


def check(writer: Writer, task: Task) -> None:
    """A row for each run and one that compares them; ``gpt.json`` is written while they run."""
    if not installed("megatron-core"):
        writer.skipped("a 64M GPT", "megatron-core is not installed")
        return
    found: dict[str, dict] = {name: read("") for name in RUNS}
    layers, hidden, heads, length, batch = _MODEL[task.device]
    words = ["--num-layers", layers, "--hidden-size", hidden, "--num-attention-heads", heads]
    words += ["--seq-length", length, "--max-position-embeddings", length]
    words += ["--micro-batch-size", batch, "--global-batch-size", batch, *_FLAGS, *LOCAL]
    words += ["--plugin-device", task.device, *_data(task)]
    # One after the other, since they are timed; in a rehearsal the start would take too long.
    at_once = 1 if task.device == "cuda" else len(RUNS)
    each = task.seconds * at_once / len(RUNS) - _END

    def run(name: str) -> None:
        more = ["--tensorboard-dir", task.folder / "tensorboard"] if name == "S3" else []
        log = task.folder / f"{name.lower()}.txt"
        _train([*words, *RUNS[name].split(), *more], log, each, found, name, task.folder)
        _row(writer, name, found[name], length * batch)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, RUNS))
    _compared(writer, found)


def _data(task: Task) -> list[str | Path]:
    train = task.data.with_name(task.data.name + "_train")
    if not train.with_name(train.name + ".bin").exists():
        return ["--mock-data"]
    valid = task.data.with_name(task.data.name + "_valid")
    return ["--train-data-path", train, "--valid-data-path", valid]


def _train(
    words: Sequence[object], log: Path, seconds: float, found: dict, name: str, folder: Path
) -> None:
    """Trains until the time is over; every other second the file gets what was printed."""
    done = Event()

    def follow() -> None:
        over = False
        while not over:
            over = done.wait(2)
            if log.exists():
                found[name] = read(log.read_text(encoding="utf-8", errors="replace"))
                part = folder / f"{name}.part"
                part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                part.rename(folder / "gpt.json")

    thread = Thread(target=follow)
    thread.start()
    try:
        run = trainer.train(
            *map(str, words),
            tiny=False,
            check=False,
            environment=ENVIRONMENT,
            threads=None,
            log=log,
            limit=seconds,
        )
    finally:
        done.set()
        thread.join()
    found[name]["ended"] = "at its time" if run.returncode == TIMED_OUT else run.error or "early"


def read(log: str) -> dict:
    """Returns what a run has printed: losses and validation losses by iteration, milliseconds."""
    run = Run(0, log)
    losses = {i: float(loss) for i, loss in run.column("lm loss").items()}
    ms = [*map(float, run.column("elapsed time per iteration (ms)").values())]
    return {
        "losses": [*losses.items()],
        "valid": [(int(i), float(loss)) for i, loss in _VALIDATION.findall(log)],
        # The first interval includes the start.
        "ms": statistics.median(ms[1:]) if len(ms) > 1 else None,
        "portable": "torch operations" in log,
    }


def _row(writer: Writer, name: str, run: dict, tokens: int) -> None:
    losses = run["losses"]
    if not losses or run["ended"] != "at its time":
        writer.failed(f"{name} trains", f"it printed {len(losses)} losses; {run['ended']}")
        return
    speed = "too few to time"
    if run["ms"]:
        speed = f"{run['ms']:.1f} ms each, {1e3 * tokens / run['ms']:,.0f} tokens a second"
    detail = f"{losses[-1][0]} iterations, {speed}; loss {losses[0][1]:.3f} to {losses[-1][1]:.3f}"
    detail += "; torch operations, not the kernel" if run["portable"] else ""
    if all(0 < loss < 100 for _, loss in losses):
        writer.passed(f"{name} trains", detail, ms=run["ms"], losses=losses)
    else:
        writer.failed(f"{name} trains", detail)


def _compared(writer: Writer, found: dict[str, dict]) -> None:
    """A row of the losses at common iterations, and at validations."""
    for kind in ("losses", "valid"):
        runs = {name: dict(run[kind]) for name, run in found.items()}
        common = sorted(set.intersection(*map(set, runs.values())))
        kept = common[:: max(1, len(common) // 8)]
        if kept:
            text = "; ".join(
                f"{name} " + ", ".join(f"{i}: {losses[i]:.3f}" for i in kept)
                for name, losses in runs.items()
            )
            what = "validation losses" if kind == "valid" else "losses on the same samples"
            writer.passed(what, text)
