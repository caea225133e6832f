"""The fused step on NVIDIA GPUs: launches :mod:`megatron_s3.kernels.gpu.kernel`."""

import contextlib
import functools
import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_s3.kernels import fused
from megatron_s3.kernels.compact import FRACTION, REMAINDER
from megatron_s3.kernels.operands import Operands, fault
from megatron_s3.kernels.statistics import FIELDS, Statistics
from megatron_s3.rules.kernel_form import Form, KernelForm, form

__all__ = ["NAME", "Prepared", "reason", "step"]

NAME = "Triton kernel"


def reason(
    rule: Callable[..., Tensor], operands: Sequence[Operands], **hyperparameters: object
) -> str | None:
    """Returns why the kernel cannot take these operands, or None.

    Args:
        rule: see :mod:`megatron_s3.rules`.
        operands: the operands of the step.
        **hyperparameters: the rule's hyperparameters.
    """
    given = form(rule, hyperparameters, "triton")
    if isinstance(given, str):
        return f"the Triton kernel does not have {given}"
    if missing := _unavailable():
        return missing
    if found := fault(operands, "cuda", given.kernel.states):
        return f"the Triton kernel cannot take {found}"
    if not operands:
        return None
    device = operands[0].param.device
    if _capability(device) < (8, 0):
        return f"the Triton kernel needs compute capability 8.0 or more, and {device} has less"
    if broken := _broken():
        return broken
    if torch.cuda.is_current_stream_capturing():
        groups = [[operands[i] for i in indices] for indices in _by_dtypes(operands).values()]
        if not all(_has_tables(group, device) for group in groups):
            return (
                "a CUDA graph is being captured, and the Triton kernel has not yet stepped these "
                "tensors: take a step before the capture, and keep the gradients at their addresses"
            )
    return None


def _has_tables(group: "_Group", device: torch.device) -> bool:
    rows = _rows(group)
    return (device, rows) in _tables and (device, _counts(rows)) in _chunks


@functools.cache
def _unavailable() -> str | None:
    if torch.version.hip is not None:
        return "the Triton kernel supports only NVIDIA GPUs"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@functools.cache
def _broken() -> str | None:
    """Returns why Triton cannot be used, or None.

    Versions before 3.3 have no tuples.  Triton builds a part of its driver with a C compiler, which
    an image may lack.
    """
    import triton
    from triton.runtime import driver

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        return f"the Triton kernel needs Triton 3.3 or newer, not {triton.__version__}"
    try:
        driver.active.get_current_target()
    except Exception as error:  # of any type; torch operations still work
        return f"Triton does not start ({error})"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class Prepared:
    """The part of a step that stays the same while the tensors stay where they are.

    It keeps their addresses and none of them.  A step is one launch for each combination of dtypes.
    The results have the same bits as the PyTorch implementation's.  If a form is ``inexact`` (S3
    with a p that is not 1, 2 or 3), they differ by a few units in the last place.  Nothing is read
    back to the host.  If a rate is on the device, its value is read when the kernel runs, so that a
    step can be captured into a CUDA graph after a first step on the same tensors.  Hyperparameters
    are fixed at launch.

    Args:
        groups: for each param group, operands for which :func:`reason` returns None; all of them
            on one device.
    """

    def __init__(self, groups: Sequence[Sequence[Operands]]) -> None:
        operands = [o for group in groups for o in group]
        self._device = operands[0].param.device if operands else None
        self._places = [
            _Place(o.written, o.read, o.row, i) for i, group in enumerate(groups) for o in group
        ]
        self._launches = _by_dtypes(operands)
        self._plans: dict[_Dtypes, _Plan] = {}

    def move_grads(self, addresses: Sequence[int]) -> None:
        """Takes the addresses of all gradients, whose dtypes and sizes are the same as before."""
        self._places = [
            place._replace(read=(address, place.read[1]))
            for place, address in zip(self._places, addresses, strict=True)
        ]
        self._plans.clear()

    def step(
        self,
        rule: Callable[..., Tensor],
        rates: Sequence[tuple[float | Tensor, float | Tensor, int]],
        statistics: Statistics | None = None,
        **hyperparameters: object,
    ) -> None:
        """Takes a step as :func:`megatron_s3.kernels.fused.step`; autograd does not notice it.

        Args:
            rule, statistics, **hyperparameters: see there.
            rates: learning rate, weight decay and seed of each group.
        """
        device = self._device
        if device is None:
            return
        # A float32 holds a seed exactly below 2**24; as an int it would be a variant of the kernel.
        numbers = [n for lr, decay, seed in rates for n in (lr, 1 - lr * decay, seed % (1 << 24))]
        # Values on the device are not read here; values on the CPU are arguments of the launch.
        on_device = None
        if any(isinstance(n, Tensor) and n.device == device for each in rates for n in each):
            on_device = torch.stack([_on(device, number) for number in numbers])
        host = tuple(map(float, numbers)) if on_device is None else (0.0, 1.0, 0.0) * len(rates)
        given = form(rule, hyperparameters)
        if isinstance(given, str):
            raise RuntimeError(f"the Triton kernel does not have {given}")
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for dtypes, indices in self._launches.items():
                group = [self._places[i] for i in indices]
                plan = self._plans[dtypes] = self._plans.get(dtypes) or _plan(group, device)
                partials = None
                if statistics is not None:
                    shape = (plan.programs, len(FIELDS))
                    partials = torch.empty(shape, dtype=torch.float64, device=device)
                _launch(plan, dtypes, given, host, on_device, partials)
                if statistics is not None and partials is not None:
                    statistics.add(partials, _statistics_rows(group, plan))


step = functools.partial(fused.step, Prepared)


def _on(device: torch.device, rate: float | Tensor) -> Tensor:
    if isinstance(rate, Tensor) and rate.device == device:
        return rate.reshape(()).float()
    return torch.full((), float(rate), dtype=torch.float32, device=device)


_Dtypes = tuple[torch.dtype | None, ...]


def _by_dtypes(operands: Sequence[Operands]) -> dict[_Dtypes, list[int]]:
    """Returns the indices of the operands of each launch, without empty ones."""
    groups: dict[_Dtypes, list[int]] = {}
    for i, o in enumerate(operands):
        if o.param.numel():
            model = None if o.model_param is None else o.model_param.dtype
            key = (o.param.dtype, o.grad.dtype, model, *(state.dtype for state in o.state))
            groups.setdefault(key, []).append(i)
    return groups


def _launch(
    plan: "_Plan",
    dtypes: _Dtypes,
    given: Form,
    host_rates: tuple[float, ...],
    rates: Tensor | None,
    partials: Tensor | None,
) -> None:
    import triton.language as tl

    from megatron_s3.kernels.gpu import kernel as gpu_kernel

    types: dict[torch.dtype | None, Any] = {
        torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
        REMAINDER: tl.int16,
    }  # fmt: skip
    param, grad, model, *states = dtypes
    groups = len(host_rates) // 3
    if FRACTION not in states:
        host_rates = tuple(rate for i, rate in enumerate(host_rates) if i % 3 < 2)
    gpu_kernel.step_kernel[(plan.programs,)](
        plan.table,
        plan.chunks,
        plan.table if rates is None else rates,
        plan.table if partials is None else partials,
        # Triton compiles another variant for an int, and treats 1 as a constant.
        host_rates,
        tuple(map(float, given.scalars)),
        GROUPS=groups,
        RULE=_function(given.kernel),
        VARIANT=given.variant,
        STATES=given.kernel.states,
        STORED=gpu_kernel.stored(states),
        PARAM=types[param],
        GRAD=types[grad],
        MODEL=types.get(model, tl.float32),
        HAS_MODEL=model is not None,
        RATES_ON_DEVICE=rates is not None,
        STATISTICS=partials is not None,
        CHUNK=gpu_kernel.CHUNK,
        BLOCK=gpu_kernel.BLOCK,
        **gpu_kernel.launch_options(
            given, statistics=partials is not None, fractions=FRACTION in states
        ),
    )


def _function(kernel: KernelForm) -> Any:
    """Returns the rule as a Triton function."""
    module, name = "megatron_s3.kernels.gpu.rules", kernel.name
    if kernel.triton is not None:
        module, _, name = kernel.triton.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class _Plan:
    """The addresses of one launch's tensors, on the device."""

    table: Tensor
    chunks: Tensor
    programs: int


class _Place(NamedTuple):
    """The addresses of a parameter's operands, attributes of :class:`Operands`, and its group."""

    written: tuple[int, ...]
    read: tuple[int, ...]
    row: int
    group: int = 0


_Row = tuple[int, ...]
_Group = Sequence[Operands] | Sequence[_Place]


class _Recent(OrderedDict[Any, Any]):
    """A cache of the 256 entries used last; an entry has a few kilobytes."""

    def find(self, key: object, make: Callable[[], Any]) -> Any:
        """Returns the value of the key, and makes it if there is none."""
        if key not in self:
            self[key] = make()
            while len(self) > 256:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


#: Tables by device, addresses and sizes, which hardly ever change in a training.
_tables = _Recent()
#: Chunks by device and sizes, so that gradients that move only need a new table.
_chunks = _Recent()
#: Rows of the statistics by device, rows of the operands and sizes.
_statistics = _Recent()
#: Tensors that a captured CUDA graph reads at each replay; they are never freed.
_captured: list[_Plan | Tensor] = []


def _rows(group: _Group) -> tuple[_Row, ...]:
    """Returns each operand's number of elements, its addresses, the gradient's last, its group."""
    return tuple((*o.written, *o.read, getattr(o, "group", 0)) for o in group)


def _counts(rows: Sequence[_Row]) -> tuple[int, ...]:
    return tuple(row[0] for row in rows)


def _plan(group: _Group, device: torch.device) -> _Plan:
    rows = _rows(group)
    counts = _counts(rows)
    table = _tables.find((device, rows), lambda: _make_table(rows, device))
    chunks = _chunks.find((device, counts), lambda: _make_chunks(counts, device))
    plan = _Plan(table, chunks, len(chunks))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(plan)
    return plan


def _statistics_rows(group: _Group, plan: _Plan) -> Tensor:
    """Returns the row of the statistics of every program: int64, on the device."""
    rows, device = tuple(o.row for o in group), plan.chunks.device

    def make() -> Tensor:
        return torch.tensor(rows, device=device)[plan.chunks[:, 0].long()]

    found: Tensor = _statistics.find((device, rows, _counts(_rows(group))), make)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(found)
    return found


def _make_table(rows: Sequence[_Row], device: torch.device) -> Tensor:
    from megatron_s3.kernels.gpu.kernel import ROW

    fields = []
    for *row, group in rows:
        count, (param, model_param, *states, grad) = row[0], row[1::2]
        aligned = all(address % 16 == 0 for address in (param, grad, model_param, *states))
        filler = (0,) * (ROW - 6 - len(states))
        fields.append((param, grad, model_param, count, aligned, group, *states, *filler))
    table = torch.tensor(fields, dtype=torch.int64, device="cpu")
    if device.type == "cpu":
        return table
    # The host does not wait: a caller that steps them on several streams must order the steps.
    return table.pin_memory().to(device, non_blocking=True)


def _make_chunks(counts: Sequence[int], device: torch.device) -> Tensor:
    from megatron_s3.kernels.gpu.kernel import CHUNK

    chunks = torch.tensor([-(-count // CHUNK) for count in counts], device="cpu")
    tensor = torch.arange(len(counts), device="cpu").repeat_interleave(chunks)
    first = chunks.cumsum(0) - chunks
    index = torch.arange(len(tensor), device="cpu") - first[tensor]
    return torch.stack([tensor, index], dim=1).to(torch.int32).to(device)
