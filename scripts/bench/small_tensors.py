#!/usr/bin/env python3
"""Measures S3's step beside torch's fused AdamW on the CPU, one thread, without clipping.

    python -m scripts.bench.small_tensors [--rounds 40]

Both step alike models in every round, in an order that is drawn anew.  With small tensors the time
is that of the host's Python; with large ones, that of arithmetic and memory.  "floor" is the ratio
if S3 moved its bytes at the bandwidth of a copy of as many.  A model's tensors are 148, those of a
GPT of 12 layers.  "logged" is the ratio of S3's step with the statistics of
``--plugin-log-updates``.  For bf16 parameters torch's AdamW keeps bf16 states, and S3 float32 ones.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import Parameter

from megatron_s3 import S3
from megatron_s3.kernels.statistics import Statistics
from scripts.bench.timing import paired
from tests.harness.tables import columns

__all__ = ["CASES", "Case", "measure"]

#: Name, shapes, dtype.
Case = tuple[str, list[tuple[int, ...]], torch.dtype]


def gpt(hidden: int) -> list[tuple[int, ...]]:
    """Returns the shapes of a GPT of 12 layers and a vocabulary of 12,576."""
    h = hidden
    layer = [(h,), (h,), (3 * h, h), (3 * h,), (h, h), (h,), (h,), (h,), (4 * h, h), (4 * h,)]
    layer += [(h, 4 * h), (h,)]
    return [(12576 * h // 512, h), (2 * h, h), *(layer * 12), (h,), (h,)]


CASES: list[Case] = [
    ("2,000 tensors of 16", [(16,)] * 2000, torch.float32),
    *(
        (f"GPT, hidden size {hidden}, {name}", gpt(hidden), dtype)
        for hidden in (64, 128, 512)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ),
]


def measure(case: Case, rounds: int) -> list[str]:
    """Returns a row of the table for one case."""
    name, shapes, dtype = case
    models = [[Parameter(torch.randn(shape).to(dtype)) for shape in shapes] for _ in range(3)]
    for param in (param for model in models for param in model):
        param.grad = 0.01 * torch.randn_like(param)
    ours, logged = S3(models[0], lr=1e-3), S3(models[2], lr=1e-3)
    logged.host.statistics = Statistics("cpu")
    theirs = torch.optim.AdamW(models[1], lr=1e-3, fused=True)
    elements, size = sum(param.numel() for param in models[0]), dtype.itemsize
    moved = elements * (3 * size + 16)  # parameter twice, gradient, two float32 states twice
    source = torch.ones(moved // 8)
    target = torch.empty_like(source)
    ms = _rounds([ours.step, theirs.step, lambda: target.copy_(source), logged.step], rounds)
    ratio = paired(ms[0], ms[1])
    floor = statistics.median(ms[2]) / statistics.median(ms[1])
    times = [f"{statistics.median(some):.2f}" for some in ms[:2]]
    ratios = [f"{ratio.median:.2f}", f"{ratio.q1:.2f}-{ratio.q3:.2f}"]
    with_statistics = f"{paired(ms[3], ms[1]).median:.2f}"
    return [name, f"{elements:,}", *times, *ratios, with_statistics, f"{floor:.2f}"]


def _rounds(steps: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Returns the milliseconds of each call in each round, after three rounds that do not count."""
    drawn = random.Random(1)
    ms: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 3):
        for i in drawn.sample(range(len(steps)), len(steps)):
            begin = time.perf_counter()
            steps[i]()
            ms[i].append(1e3 * (time.perf_counter() - begin))
    return [some[3:] for some in ms]


def main() -> None:
    """Prints the table, and each case when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [["", "parameters", "S3 ms", "AdamW ms", "ratio", "IQR", "logged", "floor"]]
    for case in CASES:
        rows.append(measure(case, rounds))
        print(f"{case[0]}: ratio {rows[-1][4]}", flush=True)
    print()
    print(columns(rows, right=range(1, 8)))


if __name__ == "__main__":
    main()
