"""The tensors that all candidates of the benchmark of the step share, on the shards of one rank."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scripts.bench.shards import Shard

__all__ = ["COPIED", "FLAT", "SHAPES", "Memory", "Unavailable", "cut", "most_elements", "placed"]
__all__ += ["shards_of"]

ROOT = Path(__file__).resolve().parents[2]
#: Shapes by name: a configuration of the package, and the number of GPUs.
SHAPES = {
    "64m-dp1": ("gpt2-345m-paper-s3", 1),
    "345m-dp8": ("layouts/gpt2-345m/8gpu", 8),
    "7b-dp64": ("layouts/gpt2-7b/512gpu", 128),  # tensor parallelism of 2
}
#: Number of elements of the shape "flat", by device.
FLAT = {"cpu": 1 << 26, "cuda": 1 << 28}
#: Number of elements of the copied tensor, which is too large for any cache, by device.
COPIED = {"cpu": 1 << 26, "cuda": 1 << 28}
#: Distances in a buffer are kept modulo this many elements.
_PAGE = 4096
#: Bytes per parameter that this benchmark needs: x, g, m and v in fp32 and in bf16, and temporaries
#: of foreach or states of Transformer Engine and Apex.
_BYTES_HERE = 16 + 8 + 16


class Unavailable(Exception):
    """Raised if a shape or device is not available; the message says why."""


def shards_of(shape: str, rank: int, device: str, known: Path | None = None) -> list[Shard]:
    """Returns a rank's shards; Megatron runs in a separate process without a GPU.

    Args:
        shape: one of :data:`SHAPES`, or "flat".
        rank: number of the rank.
        device: "cpu" or "cuda".
        known: a JSON file of shards by shape and rank; what it lacks is added to it.

    Raises:
        Unavailable: Megatron is not installed, or it rejects the configuration.
    """
    if shape == "flat":
        return [Shard(FLAT[device], 0, 0, 0)]
    stored = json.loads(known.read_text()) if known is not None and known.exists() else {}
    key = f"{shape}, rank {rank}"
    if key not in stored:
        stored[key] = _asked(shape, rank)
        if known is not None:
            known.write_text(json.dumps(stored) + "\n", encoding="utf-8")
    return [Shard(*values) for values in stored[key]]


def _asked(shape: str, rank: int) -> list[list[int]]:
    config, gpus = SHAPES[shape]
    command = [sys.executable, "-m", "scripts.bench.shards", config, "--gpus", str(gpus)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, "--rank", str(rank)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Unavailable(
            f"{shape}: {lines[-1].removeprefix('error: ')} (flat needs no megatron-core)"
        )
    found: list[list[int]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def cut(shards: Sequence[Shard], limit: int) -> list[Shard]:
    """Returns the first shards up to ``limit`` elements in total; the last one is truncated."""
    kept, left = [], limit
    for shard in shards:
        if left <= 0:
            break
        kept.append(Shard(min(shard.numel, left), shard.offset, shard.buffer, shard.group))
        left -= shard.numel
    return kept


def placed(shards: Sequence[Shard]) -> tuple[list[int], int]:
    """Returns each shard's place in a buffer of this rank's shards alone, and its length."""
    starts, end = [0] * len(shards), 0
    order = sorted(range(len(shards)), key=lambda i: (shards[i].buffer, shards[i].offset))
    for i in order:
        starts[i] = end + (shards[i].offset - end) % _PAGE
        end = starts[i] + shards[i].numel
    return starts, end


class Memory:
    """The tensors of all candidates.

    Attributes:
        groups: indices of the shards of each param group.
        params: main parameters, fp32.
        grads: gradients by dtype; views of one buffer.
        states: the two states of each shard by dtype.
        model_params: model parameters, bf16; views of one buffer.
        copied: source and destination of the large copy.
        norms: the norm of the gradients by dtype, kept on the host to avoid a synchronization.
    """

    def __init__(self, shards: Sequence[Shard], device: str) -> None:
        generator = torch.Generator(device).manual_seed(1)
        starts, length = placed(shards)
        spans = [(start, s.numel) for start, s in zip(starts, shards, strict=True)]
        groups: dict[int, list[int]] = {}
        for i, shard in enumerate(shards):
            groups.setdefault(shard.group, []).append(i)
        self.groups = list(groups.values())
        self.elements = sum(n for _, n in spans)
        fp32, bf16 = torch.float32, torch.bfloat16

        def views(buffer: Tensor) -> list[Tensor]:
            return [buffer[start : start + n] for start, n in spans]

        gradients = torch.empty(length, device=device).normal_(0, 1e-3, generator=generator)
        self.grads = {fp32: views(gradients), bf16: views(gradients.bfloat16())}
        self.model_params = views(torch.zeros(length, device=device, dtype=bf16))
        self.params = [
            torch.empty(n, device=device).normal_(0, 0.02, generator=generator) for _, n in spans
        ]
        self.states = {
            dtype: [
                tuple(torch.zeros(n, device=device, dtype=dtype) for _ in range(2))
                for _, n in spans
            ]
            for dtype in (fp32, bf16)
        }
        self.norms = {
            dtype: float(torch.nn.utils.get_total_norm(grads))
            for dtype, grads in self.grads.items()
        }
        count = COPIED[device]
        self.copied = (torch.ones(count, device=device), torch.empty(count, device=device))

    def param_groups(
        self, of: Sequence[Tensor] | None = None
    ) -> tuple[list[dict], list[torch.nn.Parameter]]:
        """Returns param groups for one optimizer, and their parameters in the order of the shards.

        Gradients are attributes of a parameter, so each candidate has its own parameters on the
        shared memory: that of the main parameters, or of the tensors ``of``.
        """
        params = [torch.nn.Parameter(p, requires_grad=True) for p in of or self.params]
        return [{"params": [params[i] for i in group]} for group in self.groups], params

    def check(self) -> None:
        """Raises ArithmeticError unless everything is finite."""
        states = [t for both in self.states.values() for pair in both for t in pair]
        for tensor in (*self.params, *self.model_params, *states, *self.grads[torch.float32]):
            if not bool(tensor.isfinite().all()):
                raise ArithmeticError("a step has left NaN or inf behind: its time says nothing")


def most_elements(device: str) -> int:
    """Returns the number of elements that fit in half of the free memory."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        with contextlib.suppress(
            OSError, StopIteration
        ):  # includes memory that the kernel can reclaim
            lines = Path("/proc/meminfo").read_text().splitlines()
            line = next(line for line in lines if line.startswith("MemAvailable"))
            free = 1024 * int(line.split()[1])
    free -= 2 * 4 * COPIED[device]
    return max(1, free // 2 // _BYTES_HERE)
