#!/usr/bin/env python3
"""Measures the cost of --plugin-log-updates per iteration, in Megatron's trainer on a CPU.

    python -m scripts.bench.telemetry_overhead [--pairs 5] [--iters 120]

The runs train the quickstart's model in pairs, with and without the flag, in random order. The time
of a run is its median over logging intervals.
"""

import argparse
import random
import statistics
import sys
import tempfile

from megatron_s3 import data
from scripts.experiments import model
from tests.harness.trainer import train


def main() -> int:
    """Prints a line for each pair, then the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--iters", type=int, default=120)
    args = parser.parse_args()
    drawn, ratios = random.Random(1), []
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/text"
        data.build(data.source("stdlib", "text", None), prefix, tokenizer="bytes", overwrite=True)
        for pair in range(args.pairs):
            times = {}
            for on in drawn.sample([False, True], 2):
                times[on] = iteration(args.iters, prefix, f"{folder}/{pair}-{on}", on)
            ratios.append(times[True] / times[False])
            print(
                f"pair {pair + 1}: {times[True]:.1f} ms with, {times[False]:.1f} without, "
                f"ratio {ratios[-1]:.3f}",
                flush=True,
            )
    print(
        f"median ratio {statistics.median(ratios):.3f}, "
        f"from {min(ratios):.3f} to {max(ratios):.3f}, {args.pairs} pairs"
    )
    return 0


def iteration(iters: int, prefix: str, folder: str, on: bool) -> float:
    """Trains on one rank, and returns the milliseconds per iteration of the median interval."""
    log = f"plugin_log_updates={'true' if on else 'null'}"
    words = [*model.words("S3", iters, log), "--tensorboard-dir", folder]
    words += data.megatron_arguments(prefix)
    run = train(*words, tiny=False, check=False, threads=None)
    times = [*map(float, run.column("elapsed time per iteration (ms)").values())]
    if run.returncode or len(times) < 3:
        sys.exit(f"{run.log[-4000:]}\nerror: the run ended with status {run.returncode}")
    return statistics.median(times[1:])


if __name__ == "__main__":
    sys.exit(main())
