"""The kernel under compute-sanitizer: accesses out of bounds, races, memory that nobody wrote."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.acceptance.environment import sanitizer
from scripts.acceptance.rows import Writer

__all__ = ["PROGRAM", "check"]

_STATUS = 87  # of a program in which an error was found

#: Few tensors of every alignment, in both loops, with gaps of their own by plain cudaMalloc.
PROGRAM = """
import torch
from torch import Tensor
from scripts.acceptance.kernels import OPTIONS, Case, Placed
from megatron_s3.kernels import gpu
from megatron_s3.kernels.operands import Operands
from megatron_s3.rules.s3 import s3_update

chunk = 16384
for case in (Case(), Case(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16)):
    sizes = (1, 129, chunk - 1, chunk, chunk + 1)
    placed = [Placed(n, case, "cuda", offset=k) for n in sizes for k in (0, 1)]
    gpu.step(s3_update, [one.operands for one in placed], **OPTIONS)
    # Tensors whose memory ends where they end.
    start = [one.start for one in placed]
    exact = [
        Operands(
            *(o.param.cuda(), o.grad.cuda()),
            *(tuple(map(Tensor.cuda, o.state)), o.model_param.cuda()),
        )
        for o in start
    ]
    gpu.step(s3_update, exact, **OPTIONS)
    torch.cuda.synchronize()
print("stepped")
"""


def check(writer: Writer, device: str, folder: Path) -> None:
    """One row for each tool."""
    path = sanitizer()
    if device == "cpu" or path is None:
        why = "needs a GPU" if device == "cpu" else "not on the PATH nor in /usr/local/cuda/bin"
        writer.skipped("compute-sanitizer", why)
        return
    # Whether it can work here at all: virtual machines and containers may not let it.
    probe = _run(
        path, "memcheck", "import torch; torch.zeros(1, device='cuda').item(); print('stepped')"
    )
    if probe.returncode:
        (folder / "probe.txt").write_text(probe.stdout)
        lines = [line for line in probe.stdout.splitlines() if line.startswith("=========")]
        why = (lines or probe.stdout.strip().splitlines() or ["no output"])[-1]
        writer.skipped("compute-sanitizer", f"it cannot run a program without our kernel: {why}")
        return
    for tool in ("memcheck", "initcheck", "racecheck"):
        done = _run(path, tool, PROGRAM)
        (folder / f"{tool}.txt").write_text(done.stdout)
        if done.returncode == 0 and "stepped" in done.stdout:
            writer.passed(tool, "no error")
            continue
        lines = [line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=====")]
        found = next(filter(None, lines), f"status {done.returncode}")
        if done.returncode == 124:
            writer.skipped(tool, "no end within 60 s")
        elif done.returncode == _STATUS and "step_kernel" not in done.stdout:
            writer.skipped(tool, f"errors of other kernels, none of ours: {found} (see {tool}.txt)")
        else:
            writer.failed(tool, f"{found} (see {tool}.txt)")


def _run(path: str, tool: str, program: str) -> subprocess.CompletedProcess:
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(program)
        file.flush()
        # Drivers and torch ask for what may not be there; that is no error of a kernel.
        command = [path, "--tool", tool, "--error-exitcode", str(_STATUS)]
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        # torch's caching allocator would hide what lies beyond a tensor.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            return subprocess.run(
                [*command, sys.executable, file.name],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60,
                env=environment,
            )
        except subprocess.TimeoutExpired as error:
            text = (error.stdout or b"").decode(errors="replace")
            return subprocess.CompletedProcess(command, 124, text + "\nno end within 60 s")
