"""The first run: a dataset, a small GPT that is trained in two launches, a table and a picture.

`scripts/quickstart.sh` makes an environment and calls this module.  Each training consists of two
calls of `megatron-s3 launch` with a configuration of :file:`configs/quickstart`; `DIR/s3/train.log`
begins with the first one.
"""

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from megatron_s3 import data, report
from megatron_s3.errors import MegatronS3Error
from megatron_s3.launch import lock, shown
from megatron_s3.launch.config import Config, ConfigError, load
from megatron_s3.launch.launch import STOPPED
from megatron_s3.storage.newest import Unclear, newest

LAYERS, HIDDEN, SEQ_LENGTH, BATCH = 4, 128, 128, 16
_EVALUATIONS = 7
_EVAL_BATCHES = 50


class QuickstartError(MegatronS3Error):
    """A failed quickstart; the message says what to do."""


#: The runs by name, and their configurations.
RUNS = {"S3": "quickstart/s3", "AdamW": "quickstart/adamw"}

WHY = """\
S3 uses the paper's settings: beta 0.95, p 3, no clipping. The learning rate is {lr:g} and the
weight decay {weight_decay:g}, by the paper's scaling rule. Warmup takes 30 % of the run, and a
cosine to a tenth of the learning rate follows. A burst of large gradients at the start would
enlarge S3's denominator and slow it for about p/(1-beta) = 60 steps; the slow warmup avoids it."""

WHY_COMPARED = """\
AdamW uses betas 0.9 and 0.95 and clips gradients at 1. The learning rate is {lr:g} and the
weight decay {weight_decay:g}; schedule and data are those of S3. The learning rate of each
optimizer is the best of 3e-3, 6e-3 and 1e-2 on the standard library, chosen on the same validation
text. One seed at this size does not show which optimizer is better."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; the process's own when None.

    Returns:
        0; 1 if training, the network or the disk failed; 2 if the input is unusable; 130 if
        interrupted.
    """
    args = _arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torchrun ends with this process
    try:
        return _run(args)
    except (data.DataError, report.RunError, lock.InUse, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except QuickstartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (data.IncompleteError, OSError) as error:
        print(f"error: {error}; run the same command again to continue", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nstopped; run the same command again to continue from the last checkpoint",
            file=sys.stderr,
        )
        return 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; the help is in the script that users call."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="./scripts/quickstart.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--input", default="stdlib")
    parser.add_argument("--json-key", default="text")
    parser.add_argument("--glob", action="append")
    parser.add_argument("--iters", type=int, default=700)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args(argv)
    if args.iters < 10:
        parser.error(f"--iters {args.iters} is too small; give at least 10")
    if args.nproc is not None and (args.nproc < 1 or BATCH % args.nproc):
        parser.error(
            f"--nproc {args.nproc}: must divide the batch of {BATCH} samples; give 2, for instance"
        )
    return args


def _run(args: argparse.Namespace) -> int:
    prefix = str(args.out / "data" / "text")
    src = data.source(args.input, args.json_key, args.glob)
    dataset, reused = data.build(src, prefix, tokenizer="bytes", overwrite=True)
    for side in ("train", "valid"):
        if dataset[side]["bytes"] <= SEQ_LENGTH:
            raise data.DataError(
                f"--input {src}: the {side} part has {dataset[side]['bytes']} bytes, and a sample "
                f"needs {SEQ_LENGTH + 1}; give more text"
            )
    print(
        f"dataset   {prefix}: {src}, {dataset['train']['bytes'] / 1e6:.1f} MB for training, "
        f"{dataset['valid']['bytes'] / 1e6:.2f} MB for validation{' (reused)' if reused else ''}"
    )
    nproc = args.nproc or _default_nproc()
    names = list(RUNS) if args.compare else ["S3"]
    rates = {name: _rates(load([RUNS[name]])) for name in names}
    for name, why in zip(names, (WHY, WHY_COMPARED), strict=False):
        print(why.format(**rates[name]))
    if not multiplies_bf16():
        print(
            "precision fp32 instead of bf16: on this CPU torch emulates matrix products of bf16, "
            "which is ten times slower"
        )
    with lock.hold([args.out]):
        for name in names:
            _train(name, args, nproc, prefix, dataset)
    runs = [report.read(args.out / name.lower() / "tensorboard", name) for name in names]
    picture = args.out / "loss.png"
    report.draw(
        runs,
        picture,
        title=f"GPT, {LAYERS} layers of {HIDDEN}, {nproc} ranks, {BATCH} x {SEQ_LENGTH} bytes",
        unigram_entropy=dataset["unigram_entropy"],
    )
    print(_table(runs, rates, dataset, args.out, picture, args.iters))
    return 0


def _rates(config: Config) -> dict[str, float]:
    return {name: float(str(config.arguments[name])) for name in ("lr", "weight_decay")}


def _default_nproc() -> int:
    import torch

    gpus = torch.cuda.device_count()
    return max((n for n in range(1, gpus + 1) if BATCH % n == 0), default=2)


def multiplies_bf16() -> bool:
    """Returns whether torch has matrix products for bf16 where the quickstart trains.

    On a CPU without AVX-512 torch uses loops instead, which take ten times as long as fp32.
    """
    import torch

    return torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def settings(
    iters: int, nproc: int, bf16: bool = True, eval_batches: int = _EVAL_BATCHES
) -> list[str]:
    """Returns the settings that a run adds to its configuration, as ``KEY=VALUE``.

    Args:
        iters: length of the whole run and of the schedule of the learning rate.
        nproc: number of ranks, all of them data-parallel.
        bf16: mixed precision with main parameters in fp32; otherwise everything is in fp32.
        eval_batches: number of batches in an evaluation.
    """
    return [
        f"train_iters={iters}",
        f"save_interval={iters // 2}",
        f"eval_interval={max(1, iters // _EVALUATIONS)}",
        f"eval_iters={eval_batches}",
        f"log_interval={max(1, min(10, iters // 10))}",
        f"micro_batch_size={BATCH // nproc}",
        f"launch.nproc_per_node={nproc}",
        f"bf16={str(bf16).lower()}",
    ]


def _train(
    name: str, args: argparse.Namespace, nproc: int, prefix: str, dataset: dict[str, Any]
) -> None:
    """Trains a run to its end in two launches, unless it is finished; the second one resumes."""
    folder = args.out / name.lower()
    sets = settings(args.iters, nproc, multiplies_bf16(), _eval_batches(args.iters, dataset))
    plan = {"sets": sets, "text_sha256": dataset["sha256"]}
    record = folder / "run.json"
    old = _load(record)
    if old.get("plan") == plan and old.get("finished") and not args.fresh:
        print(f"{name}: finished before; nothing is trained (--fresh trains again)")
        return
    half = args.iters // 2
    at = _checkpointed(folder)
    if args.fresh or old.get("plan") != plan or not at:
        if folder.exists() and not record.exists():
            raise QuickstartError(
                f"{folder} exists and was not made by a quickstart; name another folder with --out"
            )
        shutil.rmtree(folder, ignore_errors=True)
        at = 0
    folder.mkdir(parents=True, exist_ok=True)
    _store(record, {"plan": plan, "finished": False})
    words = [RUNS[name], "--run-dir", str(folder), "--set", f"dataset={prefix}"]
    for each in sets:
        words += ["--set", each]
    log = folder / "train.log"
    if at < half:
        print(f"{name}: iterations 1 to {half}, then a checkpoint")
        _launch([*words, "--set", f"exit_interval={half}"], log, STOPPED)
        at = _checkpointed(folder)
        if at != half:
            raise QuickstartError(
                f"no checkpoint of iteration {half} was written; the reason is in {log}"
            )
    print(f"{name}: resumed in a new process from the checkpoint of iteration {at}")
    _launch(words, log, 0)
    _store(record, {"plan": plan, "finished": True})


def _eval_batches(iters: int, dataset: dict[str, Any]) -> int:
    """Returns the number of batches of an evaluation, which reads no text twice.

    It is at most the number of training batches.
    """
    whole = -(-int(dataset["valid"]["bytes"]) // (BATCH * SEQ_LENGTH))
    return min(_EVAL_BATCHES, whole, iters)


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _store(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _checkpointed(folder: Path) -> int:
    """Returns the iteration of the newest checkpoint, 0 if there is none."""
    try:
        found = newest(folder / "checkpoints")
    except (Unclear, OSError):
        return 0
    return found if isinstance(found, int) else 0


def _launch(words: list[str], log: Path, expected: int) -> None:
    """Runs `megatron-s3 launch`, shows its progress and writes its output to `log`.

    Raises:
        QuickstartError: its exit status is not the expected one.
    """
    status = shown.launch(words, log, tokens=BATCH * SEQ_LENGTH)
    if status != expected:
        print("\n".join(f"  | {line}" for line in shown.tail(log)), file=sys.stderr)
        raise QuickstartError(f"training ended with status {status}; its complete log is {log}")


def _table(
    runs: list[report.Run],
    rates: dict[str, dict[str, float]],
    dataset: dict[str, Any],
    out: Path,
    picture: Path,
    iters: int,
) -> str:
    summaries = [report.summarize(run) for run in runs]

    def row(label: str, values: list[float | None], form: str, note: str) -> str:
        cells = "".join(f"{'-' if v is None else format(v, form):>10}" for v in values)
        return f"{label:20}{cells}   {note}".rstrip()

    entropy = dataset["unigram_entropy"]
    batches = _eval_batches(iters, dataset)
    tested = min(dataset["valid"]["bytes"], batches * BATCH * SEQ_LENGTH)
    lines = [
        "",
        " " * 20 + "".join(f"{run.name:>10}" for run in runs),
        row("peak learning rate", [rate["lr"] for rate in rates.values()], "g", ""),
        row("validation loss", [s.valid_loss for s in summaries], ".3f",
            f"nats per byte, on {tested:,} bytes"),
        row("unigram entropy", [entropy] * len(runs), ".3f",
            "nats per byte: the loss of knowing byte frequencies only"),
        row("largest |update|", [s.largest_update for s in summaries], ".3f",
            "in units of the learning rate; S3's cannot exceed 1"),
        row("tokens per second", [s.tokens_per_second for s in summaries], ",.0f", "training"),
        "",
    ]  # fmt: skip
    for name in rates:
        lines += [
            f"{name} checkpoints".ljust(20) + str(out / name.lower() / "checkpoints"),
            f"{name} TensorBoard".ljust(20) + str(out / name.lower() / "tensorboard"),
        ]
    lines += ["picture".ljust(20) + str(picture), "report".ljust(20) + f"megatron-s3 report {out}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
