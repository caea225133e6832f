"""The kernel beside a copy of memory, and the optimizer's phase beside AdamW's, in one run each.

The kernel is timed by replays of a CUDA graph of the step, so that what the host does is left out;
the phases as :mod:`scripts.bench.step` times them, launches included.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from megatron_s3.report.styles import styles
from scripts.acceptance.environment import installed
from scripts.acceptance.rows import Writer

__all__ = ["LEAST_SHARE", "MOST_RATIO", "check", "phases", "replays", "shares_figure"]

#: The kernel's share of the bandwidth of a copy.
LEAST_SHARE = 0.90
#: Of AdamW's phase with norm and clipping, by key of the candidate.
MOST_RATIO = {"fp32-grads-fp32-states": 0.66, "bf16-grads-bf16-states": 0.45}

_ROOT = Path(__file__).resolve().parents[2]
_ROUNDS, _REPLAYS = 20, 10


def check(writer: Writer, device: str, folder: Path) -> None:
    """Rows with bars; ``kernel.png`` and ``bench_step.png`` in the folder."""
    if not installed("matplotlib"):
        writer.skipped("the step's time", "matplotlib is not installed")
        return
    from scripts.bench import step as bench

    if device == "cuda":
        _kernel(writer, bench, folder)
    else:
        writer.skipped("the kernel beside a copy", "needs a GPU")
    _phases(writer, bench, device, folder)


# ---- the kernel ----------------------------------------------------------------------------------


def _kernel(writer: Writer, bench: ModuleType, folder: Path) -> None:
    fp32, bf16 = torch.float32, torch.bfloat16
    found: dict[str, dict[str, float]] = {}
    for shape in (*bench.SHAPES, "flat"):
        try:
            shards = bench.shards_of(shape, 0, "cuda")
        except bench.Unavailable as error:
            writer.skipped(f"kernel, {shape}", str(error))
            continue
        memory = bench.Memory(bench.cut(shards, bench.most_elements("cuda")), "cuda")
        calls = {"copy": (lambda m=memory: m.copied[1].copy_(m.copied[0]))}
        moved = {"copy": 2 * memory.copied[0].nbytes}
        for grad, state in ((fp32, fp32), (bf16, fp32), (fp32, bf16), (bf16, bf16)):
            candidate = bench.s3(memory, True, 3.0, grad, state)
            key = candidate.key.split("p3-")[1]
            calls[key] = candidate.step
            moved[key] = candidate.bytes_per_parameter * memory.elements
        seconds = replays(calls)
        gb_s = {key: moved[key] / statistics.median(seconds[key]) / 1e9 for key in calls}
        memory.check()
        found[shape] = {key: gb_s[key] / gb_s["copy"] for key in calls if key != "copy"}
        for key, share in found[shape].items():
            writer.measured(
                f"kernel, {shape}, {key}",
                share,
                least=LEAST_SHARE,
                detail=f"{gb_s[key]:,.0f} of {gb_s['copy']:,.0f} GB/s, {memory.elements:,}",
                gb_s=gb_s[key],
                copy_gb_s=gb_s["copy"],
                microseconds=[1e6 * s for s in seconds[key]],
            )
        del memory, calls, candidate
        torch.cuda.empty_cache()
    if found:
        shares_figure(found, torch.cuda.get_device_name()).savefig(folder / "kernel.png")


def replays(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each call in every round, replayed from CUDA graphs in an order that moves on.

    Args:
        calls: what to capture; each is called three times before.
    """
    graphs = {}
    side = torch.cuda.Stream()
    for key, call in calls.items():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graphs[key] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[key]):
            call()
    order = list(calls)
    seconds: dict[str, list[float]] = {key: [] for key in order}
    for turn in range(_ROUNDS):
        first = turn % len(order)
        for key in order[first:] + order[:first]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graphs[key].replay()  # whatever another call has left in caches
            start.record()
            for _ in range(_REPLAYS):
                graphs[key].replay()
            end.record()
            end.synchronize()
            seconds[key].append(start.elapsed_time(end) / 1e3 / _REPLAYS)
    return seconds


def shares_figure(found: dict[str, dict[str, float]], device: str):
    """Bars of the kernel's share of a copy's bandwidth.

    Args:
        found: share by shape and dtypes.
        device: for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [
        (f"{shape}, {key}", share) for shape, keys in found.items() for key, share in keys.items()
    ]
    drawn = Figure(figsize=(9, 1.4 + 0.3 * len(bars)), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    colour = styles(["S3"])[0].colour
    axes.barh(range(len(bars)), [share for _, share in bars], color=colour, edgecolor="k")
    for row, (_, share) in enumerate(bars):
        axes.text(share + 0.01, row, f"{share:.2f}", va="center", fontsize=8)
    axes.axvline(LEAST_SHARE, color="k", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.1, 0.1 + max(share for _, share in bars)))
    axes.set_xlabel(f"share of the bandwidth of a copy (dotted: the bar, {LEAST_SHARE:.2f})")
    axes.set_title(f"S3's kernel, p=3, on {device}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


# ---- phases --------------------------------------------------------------------------------------


def _phases(writer: Writer, bench: ModuleType, device: str, folder: Path) -> None:
    command = [sys.executable, "-m", "scripts.bench.step", "--device", device]
    command += ["--output", folder]
    if device == "cpu":  # that it runs, and no more
        command += "--shapes flat --rounds 2 --elements-limit 100000 --threads 1".split()
    else:
        command += ["--rounds", "30"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        writer.failed("the phase beside AdamW's", lines[-1])
        return
    record = json.loads((folder / "bench_step.json").read_text(encoding="utf-8"))
    for comparison in record["comparisons"]:
        phases(writer, comparison, judged=device == "cuda")


def phases(writer: Writer, comparison: dict, *, judged: bool) -> None:
    """Rows of one of the benchmark's comparisons.

    A ratio is to the fastest of the AdamWs that ran, norm, clipping and copy included; the others'
    are in the detail.

    Args:
        writer: told.
        comparison: from ``bench_step.json``.
        judged: whether the bars are meant for this device.
    """
    wholes = [c for c in comparison["candidates"] if c["kind"] != "phase"]
    adamws = {c["key"]: c for c in wholes if c["kind"] == "adamw"}
    fastest = min(adamws, key=lambda key: adamws[key]["ms"]["median"])
    for candidate in wholes:
        if candidate["kind"] != "kernel":
            continue
        short = candidate["key"].split("p3-")[-1]
        name = f"phase, {comparison['shape']}, {short}"
        ratios = {key: _ratio(candidate["rounds_ms"], c["rounds_ms"]) for key, c in adamws.items()}
        text = ", ".join(f"{ratio:.2f} of {key}" for key, ratio in ratios.items())
        detail = (
            f"{candidate['ms']['median']:.3f} ms, host {candidate['host_ms']['median']:.3f}: {text}"
        )
        bar = MOST_RATIO.get(short)
        if judged and bar is not None:
            writer.measured(
                name, ratios[fastest], most=bar, detail=detail, ratios=ratios, fastest=fastest
            )
        else:
            writer.passed(name, detail, ratios=ratios, fastest=fastest)


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the quotients of the same rounds."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
