"""The fused step on NVIDIA GPUs: launches :mod:`megatron_s3.kernels.gpu_kernel`."""

import contextlib
import functools
import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from megatron_s3.kernels.operands import Operands, fault
from megatron_s3.kernels.statistics import FIELDS, Statistics
from megatron_s3.rules.s3 import s3_bound

__all__ = ["NAME", "reason", "step"]

NAME = "Triton kernel"


def reason(operands: Sequence[Operands], **hyperparameters: object) -> str | None:
    """Why :func:`step` cannot take these operands, or None.

    Args:
        operands: what the step is to work on.
        **hyperparameters: the rule's; none of them matters.
    """
    if missing := _unavailable():
        return missing
    if found := fault(operands, "cuda"):
        return f"the Triton kernel cannot take {found}"
    tensors = (t for o in operands for t in (o.param, o.grad, *o.state, o.model_param))
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        return "the Triton kernel cannot take tensors on several devices in one group"
    for device in devices:
        if _capability(device) < (8, 0):
            return f"the Triton kernel needs compute capability 8.0, and {device} has less"
    return None


@functools.cache
def _unavailable() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.no_grad()
def step(
    operands: Sequence[Operands],
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    beta: float,
    p: float,
    beta2: float | None = None,
    nesterov: bool = True,
    correction: float = 1.0,
    statistics: Statistics | None = None,
) -> None:
    """One step of S3 in one launch (one for each combination of dtypes).

    For p = 1, 2, 3 the same bits as the portable path's; for others within a few units in the last
    place.  Nothing is read back to the host, and with ``lr`` on the device nothing of its value is
    fixed at launch, so that a step can be captured into a CUDA graph.

    Args:
        operands: such that :func:`reason` is None.
        lr: learning rate, a number or a 0-dim tensor on the parameters' device.
        weight_decay: decoupled weight decay.
        beta, p, beta2, nesterov, correction: as for :func:`megatron_s3.rules.s3.s3_update`.
        statistics: what to add the step's to.
    """
    kinds: dict[tuple[torch.dtype | None, ...], list[Operands]] = {}
    for o in operands:
        if o.param.numel():
            model = None if o.model_param is None else o.model_param.dtype
            key = (o.grad.dtype, o.state[0].dtype, o.state[1].dtype, model)
            kinds.setdefault(key, []).append(o)
    if not kinds:
        return
    device = operands[0].param.device
    on_device = isinstance(lr, Tensor)
    decay = 1 - lr * weight_decay
    rates = torch.stack([lr.reshape(()), decay.reshape(())]).float() if on_device else None
    beta_s = beta if beta2 is None else beta2
    fast = p in (1, 2, 3)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for dtypes, group in kinds.items():
            plan = _plan(group, device)
            partials = None
            if statistics is not None:
                partials = torch.empty(plan.programs, len(FIELDS), device=device)
            _launch(
                plan,
                dtypes,
                rates,
                partials,
                *(0.0, 1.0) if on_device else (float(lr), float(decay)),
                *(beta, 1 - beta, beta_s, 1 - beta_s),
                *(correction, s3_bound(beta, p, beta2, correction), float(p)),
                P=int(p) if fast else 0,
                NESTEROV=nesterov,
                FORGETS=beta_s == 0,
            )
            if statistics is not None:
                statistics.add(partials)
    # Autograd must notice that what it saved was changed.
    for o in operands:
        increment_version(o.param)
        if o.model_param is not None:
            increment_version(o.model_param)


def _launch(
    plan: "_Plan",
    dtypes: tuple[torch.dtype | None, ...],
    rates: Tensor | None,
    partials: Tensor | None,
    *scalars: float,
    **constants: int,
) -> None:
    import triton.language as tl

    from megatron_s3.kernels import gpu_kernel

    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    grad, exp_avg, exp_pnorm, model = (types.get(dtype, tl.float32) for dtype in dtypes)
    gpu_kernel.s3_kernel[(plan.programs,)](
        plan.table,
        plan.chunks,
        plan.table if rates is None else rates,
        plan.table if partials is None else partials,
        *scalars,
        GRAD=grad,
        EXP_AVG=exp_avg,
        EXP_PNORM=exp_pnorm,
        MODEL=model,
        HAS_MODEL=dtypes[3] is not None,
        RATES_ON_DEVICE=rates is not None,
        STATISTICS=partials is not None,
        CHUNK=gpu_kernel.CHUNK,
        BLOCK=gpu_kernel.BLOCK,
        num_warps=gpu_kernel.NUM_WARPS,
        enable_fp_fusion=False,
        **constants,
    )


@dataclass(frozen=True)
class _Plan:
    """Where one launch finds its tensors; on the device."""

    table: Tensor
    chunks: Tensor
    programs: int


#: By addresses and sizes: those of a training run hardly ever change.
_plans: OrderedDict[tuple[object, ...], _Plan] = OrderedDict()
_PLANS = 16


def _plan(group: Sequence[Operands], device: torch.device) -> _Plan:
    rows = tuple(
        (
            *(o.param.data_ptr(), o.grad.data_ptr(), o.state[0].data_ptr(), o.state[1].data_ptr()),
            *(0 if o.model_param is None else o.model_param.data_ptr(), o.param.numel()),
        )
        for o in group
    )
    key = (device, rows)
    if key in _plans:
        _plans.move_to_end(key)
        return _plans[key]
    from megatron_s3.kernels.gpu_kernel import CHUNK, ROW

    filler = (0,) * (ROW - 7)
    table = torch.tensor(
        [(*row, all(address % 16 == 0 for address in row[:5]), *filler) for row in rows],
        dtype=torch.int64,
    )
    counts = torch.tensor([-(-row[5] // CHUNK) for row in rows])
    tensor = torch.arange(len(rows)).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    index = torch.arange(len(tensor)) - first[tensor]
    chunks = torch.stack([tensor, index], dim=1).to(torch.int32)
    plan = _Plan(table.to(device), chunks.to(device), len(tensor))
    _plans[key] = plan
    while len(_plans) > _PLANS:
        _plans.popitem(last=False)
    return plan
