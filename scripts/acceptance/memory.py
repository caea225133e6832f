"""Bytes a parameter that the allocator gives out for S3's state, and what a step takes on top."""

import torch

from scripts.acceptance.rows import Writer
from scripts.acceptance.task import Task

__all__ = ["check"]

#: Parameters: as many tensors as a rank of a large job has, of some size each.
_COUNT, _SIZE = {"cuda": 128, "cpu": 8}, 1 << 18


def check(writer: Writer, task: Task) -> None:
    """One row for each precision of the states."""
    from megatron_s3 import S3

    fp32, bf16, int8 = torch.float32, torch.bfloat16, torch.int8
    states = [(fp32, fp32, 8), (bf16, fp32, 6), (fp32, bf16, 6), (bf16, bf16, 4), (int8, bf16, 3)]
    device = task.device
    total = _COUNT[device] * _SIZE
    for avg, norm, wanted in states:
        params = [
            torch.nn.Parameter(torch.ones(_SIZE, device=device)) for _ in range(_COUNT[device])
        ]
        for param in params:
            param.grad = torch.ones_like(param)
        dtypes = {"exp_avg": avg, "exp_pnorm": norm}
        optimizer = S3(params, lr=1e-3, state_dtype=dtypes)
        name = f"states in {str(avg)[6:]}, {str(norm)[6:]}"
        if device == "cpu":
            optimizer.step()
            held = sum(t.nbytes for p in params for t in optimizer.state[p].values())
            writer.row(name, "passed" if held == wanted * total else "failed", _text(held / total))
            continue
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        optimizer.init_state()
        held = torch.cuda.memory_allocated() - before
        optimizer.step()  # makes the table of tensors
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        steady = torch.cuda.memory_allocated()
        for _ in range(10):
            optimizer.step()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - steady
        grown = torch.cuda.memory_allocated() - steady
        text = f"{_text(held / total)}; a step takes {extra:,} bytes on top, and leaves {grown:,}"
        # Tensors of 2**18 elements are whole blocks of the allocator: nothing is lost to rounding.
        right = held == wanted * total and extra < 1 << 20 and grown <= 0
        writer.row(name, "passed" if right else "failed", text, held=held, extra=extra, grown=grown)
        del params, optimizer


def _text(bytes_each: float) -> str:
    return f"{bytes_each:g} bytes a parameter"
