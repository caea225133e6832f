"""The kernel under compute-sanitizer: accesses out of bounds, races, memory that nobody wrote."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from scripts.acceptance.environment import sanitizer
from scripts.acceptance.rows import Writer
from scripts.acceptance.task import Task

__all__ = ["PROGRAM", "check"]

_STATUS = 87  # of a program in which an error was found
_TOOLS = ("memcheck", "initcheck", "racecheck")
#: Seconds until a tool is ended.
_PATIENCE = 80

#: Few tensors of every alignment, in both loops, with gaps of their own by plain cudaMalloc.
PROGRAM = """
import torch
from torch import Tensor
from scripts.acceptance.kernels import OPTIONS, Case, Placed
from megatron_s3.kernels import gpu
from megatron_s3.kernels.operands import Operands
from megatron_s3.kernels.statistics import Statistics
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
    # Statistics have a loop of their own, with copies through shared memory.
    for statistics in (None, Statistics("cuda")):
        gpu.step(s3_update, exact, statistics=statistics, **OPTIONS)
    torch.cuda.synchronize()
print("stepped")
"""


def check(writer: Writer, task: Task) -> None:
    """One row for each tool."""
    path = sanitizer()
    if path is None:
        writer.skipped("compute-sanitizer", "not on the PATH nor in /usr/local/cuda/bin")
        return
    # Whether it can work here at all: virtual machines and containers may not let it.
    probe = _run(
        path, "memcheck", "import torch; torch.zeros(1, device='cuda').item(); print('stepped')"
    )
    if probe.returncode:
        (task.folder / "probe.txt").write_text(probe.stdout)
        lines = [line for line in probe.stdout.splitlines() if line.startswith("=========")]
        why = (lines or probe.stdout.strip().splitlines() or ["no output"])[-1]
        writer.skipped("compute-sanitizer", f"it cannot run a program without our kernel: {why}")
        return
    with ThreadPoolExecutor() as pool:  # side by side
        runs = {tool: pool.submit(_run, path, tool, PROGRAM) for tool in _TOOLS}
        for tool, run in runs.items():
            done = run.result()
            (task.folder / f"{tool}.txt").write_text(done.stdout)
            _judge(writer, tool, done)


def _judge(writer: Writer, tool: str, done: subprocess.CompletedProcess) -> None:
    if done.returncode == 0 and "stepped" in done.stdout:
        writer.passed(tool, "no error")
        return
    lines = [line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=====")]
    found = next(filter(None, lines), f"status {done.returncode}")
    if done.returncode == 124:
        writer.skipped(tool, f"no end within {_PATIENCE} s")
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
                timeout=_PATIENCE,
                env=environment,
            )
        except subprocess.TimeoutExpired as error:
            text = (error.stdout or b"").decode(errors="replace")
            return subprocess.CompletedProcess(
                command, 124, text + f"\nno end within {_PATIENCE} s"
            )
