"""The kernel beside a copy of memory, and the optimizer's phase beside AdamW's, in one run.

All of it is :mod:`scripts.bench.step`'s: the kernel is judged by its time on the device and the
phase by its wall time, launches included.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from scripts.acceptance.environment import installed
from scripts.acceptance.rows import Writer
from scripts.acceptance.task import Task

__all__ = ["LEAST_SHARE", "MOST_RATIO", "check", "judge"]

#: The kernel's share of the bandwidth of a copy.
LEAST_SHARE = 0.90
#: Of AdamW's phase with norm and clipping, by dtypes.
MOST_RATIO = {
    "fp32-grads-fp32-states": 0.66,
    "bf16-grads-bf16-states": 0.45,
    "bf16-grads-small-states": 0.40,
}

_ROOT = Path(__file__).resolve().parents[2]


def check(writer: Writer, task: Task) -> None:
    """Rows with bars, by shape; ``bench_step.json``, ``.txt`` and ``.png`` in the folder."""
    if not installed("matplotlib"):
        writer.skipped("the step's time", "matplotlib is not installed")
        return
    from scripts.bench.memory import SHAPES

    if task.device == "cpu":  # that it runs, and no more
        shapes = ["flat"]
        words = "--rounds 2 --elements-limit 100000 --threads 1".split()
        writer.skipped("the kernel beside a copy", "not run: it needs a GPU")
    else:
        shapes = [*SHAPES, "flat"]
        words = "--rounds 30 --only adamw triton".split()
    known = set(json.loads(task.shards.read_text())) if task.shards.exists() else set()
    for shape in shapes:
        if shape != "flat" and f"{shape}, rank 0" not in known:
            writer.skipped(shape, "its shards are not known: see the section prepare")
            shapes = [other for other in shapes if other != shape]
    command = [sys.executable, "-m", "scripts.bench.step", "--device", task.device, *words]
    command += ["--shards", task.shards, "--output", task.folder, "--shapes", *shapes]
    # What it has written after each shape is kept, whenever it is ended.
    process = subprocess.Popen(command, cwd=_ROOT, stderr=subprocess.PIPE, text=True)
    judged: set[str] = set()
    lines = []
    for line in process.stderr or ():
        print(line, end="", flush=True)
        lines.append(line.strip())
        judged |= _judge_new(writer, task, judged)
    if process.wait():
        last = lines[-1] if lines else f"exit status {process.returncode}"
        writer.failed("the phase beside AdamW's", last)
    _judge_new(writer, task, judged)


def _judge_new(writer: Writer, task: Task, judged: set[str]) -> set[str]:
    """Writes the rows of shapes that were measured since; returns their names."""
    path = task.folder / "bench_step.json"
    if not path.exists():
        return set()
    comparisons = json.loads(path.read_text(encoding="utf-8"))["comparisons"]
    new = [c for c in comparisons if c["shape"] not in judged]
    for comparison in new:
        judge(writer, comparison, judged=task.device == "cuda")
    return {c["shape"] for c in new}


def judge(writer: Writer, comparison: dict, *, judged: bool) -> None:
    """Rows of one of the benchmark's comparisons.

    The bar of a phase is for its ratio to the fastest AdamW in fp32 that clips, norm, clipping and
    copy included; the ratios to all others are in the detail.

    Args:
        writer: told.
        comparison: from ``bench_step.json``.
        judged: whether the bars are meant for this device.
    """
    from scripts.bench.candidates import HALF, UNCLIPPED

    wholes = [c for c in comparison["candidates"] if c["kind"] != "phase"]
    adamws = {c["key"]: c for c in wholes if c["kind"] == "adamw"}
    clipping = [key for key in adamws if key not in (HALF, UNCLIPPED)]
    fastest = min(clipping, key=lambda key: adamws[key]["ms"]["median"])
    shape = comparison["shape"]
    for candidate in wholes:
        if candidate["kind"] != "kernel":
            continue
        short = candidate["key"].split("p3-")[-1]
        ratios = {key: _ratio(candidate["rounds_ms"], c["rounds_ms"]) for key, c in adamws.items()}
        times = ", ".join(
            f"{word} {candidate[key]['median']:.3f}"
            for word, key in (("wall", "ms"), ("host", "host_ms"), ("device", "device_ms"))
        )
        text = ", ".join(f"{ratio:.2f} of {key}" for key, ratio in ratios.items())
        detail = f"ms: {times}; {text}"
        bar = MOST_RATIO.get(short.removesuffix("-statistics"))
        figures = {"ratios": ratios, "fastest": fastest}
        name = f"phase, {shape}, {short}"
        if not judged or bar is None:
            writer.passed(name, detail, **figures)
        else:
            writer.measured(name, ratios[fastest], most=bar, detail=detail, **figures)
        if judged:
            share = candidate["share_of_copy"]
            detail = f"{candidate['gb_s']:,.0f} of {comparison['copy']['gb_s']:,.0f} GB/s"
            writer.measured(f"kernel, {shape}, {short}", share, least=LEAST_SHARE, detail=detail)


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the quotients of the same rounds."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))
