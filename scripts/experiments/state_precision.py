#!/usr/bin/env python3
"""Compares the validation loss of S3 with states of 8, 4, 3 and 2 bytes an element, and of AdamW.

    python -m scripts.experiments.state_precision [--iters 1000] [--seeds 1234 2345 3456]
                                                  [--only ROW ...] [--out DIR]

The runs train a GPT of 0.12M parameters on the bytes of Python's standard library, with Megatron's
trainer, bf16 parameters and one rank on the CPU.  The script writes state_precision.json to DIR,
and skips runs that this file already contains.  Rows with "burst" multiply all gradients of one
iteration by 1000.  The row of 8-bit AdamW needs torchao.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_s3 import data
from scripts.experiments.runner import SMALL
from tests.harness import forks
from tests.harness.tables import columns

__all__ = ["ROWS", "main", "table"]

_S3 = "--optimizer s3 --lr 6e-3 --min-lr 6e-4 --weight-decay 5e-3"
_BOUND = f"{_S3} --s3-beta-ramp --s3-grad-bound 5"
_ADAMW = "--optimizer adam --adam-beta2 0.95 --lr 6e-3 --min-lr 6e-4 --weight-decay 5e-3"
_AWARE = "--use-distributed-optimizer --use-precision-aware-optimizer"
_BF16 = f"{_AWARE} --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
_INT8 = f"{_AWARE} --exp-avg-dtype fp8 --exp-avg-sq-dtype bf16"
_LOSS = re.compile(r"validation loss at iteration (\d+) on .*?lm loss value: ([\d.E+-]+)")
_OTHER = "scripts.experiments.narrow_states"
#: By name: flags, the module that trains, and the row with fp32 states that it is compared with.
ROWS = {
    "S3, 8 bytes": (_S3, "", ""),
    "S3, 4 bytes": (f"{_S3} {_BF16}", "", "S3, 8 bytes"),
    "S3, 3 bytes": (f"{_S3} {_INT8}", "", "S3, 8 bytes"),
    "S3, 2 bytes": (f"{_S3} --states two-bytes", _OTHER, "S3, 8 bytes"),
    "bound 5, 8 bytes": (_BOUND, "", "S3, 8 bytes"),
    "bound 5, 3 bytes": (f"{_BOUND} {_INT8}", "", "bound 5, 8 bytes"),
    "burst, S3, 8 bytes": (f"{_S3} --burst 1000", "", "S3, 8 bytes"),
    "burst, bound 5, 8 bytes": (f"{_BOUND} --burst 1000", "", "bound 5, 8 bytes"),
    "burst, bound 5, 3 bytes": (f"{_BOUND} {_INT8} --burst 1000", "", "bound 5, 8 bytes"),
    "AdamW, 8 bytes": (f"{_ADAMW} --clip-grad 1", "", "S3, 8 bytes"),
    "AdamW, torchao's 8-bit states": (
        f"{_ADAMW} --clip-grad 1 --states torchao",
        _OTHER,
        "AdamW, 8 bytes",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iters", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 2345, 3456])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--out", type=Path, default=Path("runs/state-precision"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    result = args.out / "state_precision.json"
    losses = json.loads(result.read_text()) if result.exists() else {}
    prefix = str(args.out / "text")
    data.build(data.source("stdlib", "text", None), prefix, tokenizer="bytes", overwrite=True)
    missing = [
        (key, seed, name)
        for seed in args.seeds
        for name in args.only
        if (key := _key(args.iters, seed, name)) not in losses
    ]
    failed, begun = False, time.monotonic()
    for done, (key, seed, name) in enumerate(missing, 1):
        loss = train(args, prefix, seed, name)
        if loss is None:
            failed = True
        else:
            losses[key] = loss
            result.write_text(json.dumps(losses, indent=1) + "\n")
        left = (time.monotonic() - begun) / done * (len(missing) - done) / 60
        found = "failed" if loss is None else f"{loss:.4f}"
        print(f"{key}: {found}; {left:.0f} minutes for the rest", flush=True)
    print(table(losses, args.iters, args.seeds))
    return int(failed)


def _key(iters: int, seed: int, name: str) -> str:
    return f"{iters} iterations, seed {seed}, {name}"


def train(args: argparse.Namespace, prefix: str, seed: int, name: str) -> float | None:
    """Trains a run and returns its final validation loss; None if it failed."""
    folder = args.out / f"{name}, seed {seed}".replace(",", "").replace(" ", "-")
    folder.mkdir(exist_ok=True)
    flags, module, _ = ROWS[name]
    words = [
        *SMALL,
        *("--bf16", "--seed", str(seed), "--train-iters", str(args.iters)),
        *("--lr-warmup-fraction", "0.1", "--eval-interval", str(args.iters)),
        *("--log-interval", str(max(1, args.iters // 20))),
        *data.megatron_arguments(prefix),
        *flags.split(),
    ]
    if "--burst" in words:
        words += ["--burst-at", str(args.iters // 2)]
    if "--plugin-device" not in sys.argv:
        sys.argv += ["--plugin-device", "cpu"]
    forks.prepare()
    os.environ["OMP_NUM_THREADS"] = "1"
    (folder / "log").unlink(missing_ok=True)
    ranks = forks.start(words, 1, folder / "log", module or "scripts.experiments.trainer")
    if forks.wait(ranks).status:
        print(f"failed: its log is {folder / 'log'}", file=sys.stderr)
        return None
    found = dict(_LOSS.findall((folder / "log").read_text(errors="replace")))
    return float(found[str(args.iters)])


def table(losses: Mapping[str, float], iters: int, seeds: Sequence[int]) -> str:
    """Returns a table of the rows whose runs are all there: losses, means and differences.

    A difference is to the row with states of 8 bytes, of the same seed; its spread is the standard
    deviation over the seeds.
    """
    cells = [("states", *map(str, seeds), "mean", "against", "difference", "spread")]
    known = {name: [losses.get(_key(iters, seed, name)) for seed in seeds] for name in ROWS}
    for name, (_, _, base) in ROWS.items():
        found, theirs = known[name], known.get(base, [])
        if None in found:
            continue
        mean = f"{statistics.mean(found):.4f}"
        row = [name, *(f"{loss:.4f}" for loss in found), mean, base, "", ""]
        if theirs and None not in theirs:
            differences = [a - b for a, b in zip(found, theirs, strict=True)]
            row[-2] = f"{statistics.mean(differences):+.4f}"
            if len(seeds) > 1:
                row[-1] = f"{statistics.stdev(differences):.4f}"
        cells.append(tuple(row))
    return columns(cells, right=(*range(1, len(seeds) + 2), len(seeds) + 3, len(seeds) + 4))


if __name__ == "__main__":
    sys.exit(main())
