"""The time of a call, the number of its launches, and the machine on which it was made."""

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["CLOCKS", "clocks", "launches", "machine", "timed"]

#: Milliseconds by which a stream is kept busy longer than the host took the last time.
_AHEAD = 0.5


def timed(call: Callable[[], object], device: str) -> tuple[float, float, float]:
    """Returns milliseconds: wall, host and device; on a CPU all three are the wall time."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        ms = 1e3 * (time.perf_counter() - begin)
        return ms, ms, ms
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    host = 1e3 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    wall = 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int((1.5 * host + _AHEAD) * 2e6))  # clocks, of which 2e6 are a millisecond
    start.record()
    call()
    end.record()
    end.synchronize()
    return wall, host, start.elapsed_time(end)


_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")


def launches(call: Callable[[], object], device: str) -> int | None:
    """Returns the number of launches of a call, from torch's profiler; None on a CPU."""
    if device == "cpu":
        return None
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.name.startswith(_LAUNCHES) for event in profile.events())


def _said(*command: str) -> str | None:
    """Returns the first line of a command's output; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None


#: What nvidia-smi is asked for before and after each shape.
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"


def clocks(device: str) -> str | None:
    """Returns the GPU's clocks, power, temperature and load as text; None on a CPU."""
    if device == "cpu":
        return None
    return _said("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader") or "unknown"


def machine(device: str) -> dict:
    """Returns the properties of the machine on which the figures depend."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = device == "cuda"
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),  # more than this program's threads if others were running
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": _said(*driver) if on_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
    }
