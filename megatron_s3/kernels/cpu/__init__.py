"""The fused step on the CPU: C++ (:file:`step.cpp`), compiled on first use."""

import ctypes
import functools
import itertools
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from megatron_s3.kernels.cpu.build import library_of
from megatron_s3.kernels.cpu.threads import spread
from megatron_s3.kernels.operands import Operands, fault
from megatron_s3.kernels.statistics import FIELDS, Statistics
from megatron_s3.rules.kernel_form import form

__all__ = ["NAME", "reason", "step"]

NAME = "C++ kernel"


_MOST_STATES = 4  # as in step.cpp


def reason(
    rule: Callable[..., Tensor], operands: Sequence[Operands], **hyperparameters: object
) -> str | None:
    """Returns why :func:`step` cannot take these operands; the first call compiles the kernel.

    Args:
        rule: see :mod:`megatron_s3.rules`.
        operands: the operands of the step.
        **hyperparameters: the rule's hyperparameters.
    """
    given = form(rule, hyperparameters)
    if isinstance(given, str) or (not given.kernel.own and given.kernel.cpp is None):
        return f"the C++ kernel does not have {given if isinstance(given, str) else given.name}"
    if given.inexact:
        return f"the C++ kernel has {given.inexact}"
    if found := fault(operands, "cpu", given.states):
        return f"the C++ kernel cannot take {found}"
    library = library_of(given.kernel)
    return library if isinstance(library, str) else None


@torch.no_grad()
def step(
    rule: Callable[..., Tensor],
    operands: Sequence[Operands],
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    statistics: Statistics | None = None,
    **hyperparameters: object,
) -> None:
    """Takes a step, with the same bits as the PyTorch implementation for any number of threads.

    It runs in ``torch.get_num_threads()`` threads, each with an equal number of elements.

    Args:
        rule, operands, **hyperparameters: arguments for which :func:`reason` returns None.
        lr: learning rate, a number or a 0-dim tensor on the CPU.
        weight_decay: decoupled weight decay.
        statistics: the statistics to which those of the step are added.

    Raises:
        RuntimeError: there is no compiled kernel.
    """
    given = form(rule, hyperparameters)
    library = given if isinstance(given, str) else library_of(given.kernel)
    if isinstance(given, str) or isinstance(library, str):
        raise RuntimeError(library)
    chunk_of = _chunk_of(library, given.name, given.variant)
    numbers = (float(lr), float(1 - lr * weight_decay), *given.scalars)
    scalars = (ctypes.c_float * len(numbers))(*numbers)
    table = array("q")
    filler = (0, 0) * (_MOST_STATES - given.states)
    for o in operands:
        table.extend(o.read + o.written + filler)
    counts = [o.param.numel() for o in operands]
    chunk = library.chunk_elements()
    chunks = sum(-(-count // chunk) for count in counts)
    rows = None
    if statistics is not None:
        rows = torch.empty(chunks, len(FIELDS), dtype=torch.float64, device="cpu")
    address, total = table.buffer_info()[0], sum(counts)

    def run(begin: int, end: int) -> None:
        library.step(
            *(chunk_of, address, len(counts), begin, end),
            *(ctypes.byref(scalars), None if rows is None else rows.data_ptr()),
        )

    threads = max(1, min(torch.get_num_threads(), chunks))
    bounds = [total * i // threads for i in range(threads + 1)]
    spread(run, list(itertools.pairwise(bounds)))
    if statistics is not None and rows is not None:
        counted = torch.tensor([-(-count // chunk) for count in counts], device="cpu")
        row = torch.tensor([o.row for o in operands], device="cpu")
        statistics.add(rows, row.repeat_interleave(counted))
    # Autograd must notice that tensors that it saved have changed.
    for o in operands:
        increment_version(o.param)
        if o.model_param is not None:
            increment_version(o.model_param)


@functools.cache
def _chunk_of(library: ctypes.CDLL, name: str, variant: int) -> int:
    """Returns the address of the function that updates a chunk by a rule."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int64)
    return int(prototype((f"rule_{name}", library))(variant))
