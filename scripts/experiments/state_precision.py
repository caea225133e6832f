#!/usr/bin/env python3
"""Compares the validation loss of S3 with states in bf16 and in fp32, over several seeds.

    python -m scripts.experiments.state_precision [--iters 200] [--seeds 1234 2345 3456] [--out DIR]

The runs train the quickstart's model on the bytes of Python's standard library, with Megatron's
trainer, bf16 parameters and one rank on the CPU.  The script writes state_precision.json to DIR,
and skips runs that this file already contains.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from megatron_s3 import data
from scripts.experiments import model
from tests.harness import trainer
from tests.harness.tables import columns

STATES = {
    "fp32": [],
    "bf16": [
        "--use-precision-aware-optimizer",
        *("--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"),
    ],
}
_LOSS = re.compile(r"validation loss at iteration (\d+) on .*?lm loss value: ([\d.E+-]+)")


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 2345, 3456])
    parser.add_argument("--out", type=Path, default=Path("runs/state-precision"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    result = args.out / "state_precision.json"
    losses = json.loads(result.read_text()) if result.exists() else {}
    prefix = str(args.out / "text")
    data.build(data.source("stdlib", "text", None), prefix, tokenizer="bytes", overwrite=True)
    for seed in args.seeds:
        for states, flags in STATES.items():
            key = f"{args.iters} iterations, seed {seed}, {states}"
            if key not in losses:
                losses[key] = train(args, prefix, seed, flags)
                result.write_text(json.dumps(losses, indent=1) + "\n")
            print(f"{key}: {losses[key]:.4f}", flush=True)
    print(table(losses, args))
    return 0


def train(args: argparse.Namespace, prefix: str, seed: int, flags: list[str]) -> float:
    """Trains a run and returns its final validation loss."""
    words = [
        *model.words("S3", args.iters, "plugin_log_updates=null"),
        *(*data.megatron_arguments(prefix), *flags),
        *("--seed", str(seed), "--eval-interval", str(args.iters)),
    ]
    done = trainer.train(*words, tiny=False, check=False, threads=None)
    found = dict(_LOSS.findall(done.log))
    if done.returncode or str(args.iters) not in found:
        sys.exit(f"{done.log[-4000:]}\nerror: the run ended with status {done.returncode}")
    return float(found[str(args.iters)])


def table(losses: dict[str, float], args: argparse.Namespace) -> str:
    """Returns a table with one row for each seed, then means and standard deviations."""
    rows = []
    for seed in args.seeds:
        pair = [losses[f"{args.iters} iterations, seed {seed}, {states}"] for states in STATES]
        rows.append((*pair, pair[1] - pair[0]))
    cells = [("seed", *STATES, "difference")]
    for seed, (a, b, d) in zip(args.seeds, rows, strict=True):
        cells.append((str(seed), f"{a:.4f}", f"{b:.4f}", f"{d:+.4f}"))
    a, b, d = (statistics.mean(column) for column in zip(*rows, strict=True))
    cells.append(("mean", f"{a:.4f}", f"{b:.4f}", f"{d:+.4f}"))
    if len(rows) > 1:
        deviations = (statistics.stdev(column) for column in zip(*rows, strict=True))
        cells.append(("s.d.", *(f"{x:.4f}" for x in deviations)))
    return columns(cells, right=range(4))


if __name__ == "__main__":
    sys.exit(main())
