"""The fused step on the CPU: C++ (:file:`step.cpp`), compiled on first use."""

import ctypes
import functools
import itertools
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_s3.kernels import fused
from megatron_s3.kernels.cpu.build import library_of
from megatron_s3.kernels.cpu.threads import spread
from megatron_s3.kernels.operands import Operands, fault
from megatron_s3.kernels.statistics import FIELDS, Statistics
from megatron_s3.rules.kernel_form import form

__all__ = ["NAME", "Prepared", "reason", "step"]

NAME = "C++ kernel"


_ROW = 15  # numbers in a row of the table: the struct Operands of step.cpp


def reason(
    rule: Callable[..., Tensor], operands: Sequence[Operands], **hyperparameters: object
) -> str | None:
    """Returns why the kernel cannot take these operands; the first call compiles it.

    Args:
        rule: see :mod:`megatron_s3.rules`.
        operands: the operands of the step.
        **hyperparameters: the rule's hyperparameters.
    """
    given = form(rule, hyperparameters, "cpp")
    if isinstance(given, str):
        return f"the C++ kernel does not have {given}"
    if given.inexact:
        return f"the C++ kernel has {given.inexact}"
    if found := fault(operands, "cpu", given.kernel.states):
        return f"the C++ kernel cannot take {found}"
    library = library_of(given.kernel)
    return library if isinstance(library, str) else None


class Prepared:
    """The part of a step that stays the same while the tensors stay where they are.

    It keeps their addresses and none of them.  A step has the same bits as the PyTorch
    implementation for any number of threads.  It runs in ``torch.get_num_threads()`` threads, each
    with an equal number of elements.

    Args:
        groups: for each param group, operands for which :func:`reason` returns None.
    """

    def __init__(self, groups: Sequence[Sequence[Operands]]) -> None:
        self._groups = [_Table(operands) for operands in groups]

    def move_grads(self, addresses: Sequence[int]) -> None:
        """Takes the addresses of all gradients, whose dtypes and sizes are the same as before."""
        left = iter(addresses)
        for table in self._groups:
            table.move_grads(list(itertools.islice(left, len(table.counts))))

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
            rates: learning rate, weight decay and seed of each group; tensors are on the CPU.

        Raises:
            RuntimeError: there is no compiled kernel.
        """
        given = form(rule, hyperparameters)
        library = given if isinstance(given, str) else library_of(given.kernel)
        if isinstance(given, str) or isinstance(library, str):
            raise RuntimeError(library)
        chunk_of = _chunk_of(library, given.kernel.name, given.variant)
        for table, (lr, decay, seed) in zip(self._groups, rates, strict=True):
            # A float32 is exact below 2**24.
            numbers = (float(lr), float(1 - lr * decay), seed % (1 << 24), *given.scalars)
            table.step(library, chunk_of, numbers, statistics)


step = functools.partial(fused.step, Prepared)


class _Table:
    """The addresses of a group's operands, as step.cpp takes them."""

    def __init__(self, operands: Sequence[Operands]) -> None:
        self._table = array("q")
        filler = (0,) * (_ROW - len(operands[0].read + operands[0].written)) if operands else ()
        for o in operands:
            self._table.extend(o.read + o.written + filler)
        self.counts = [o.param.numel() for o in operands]
        self._rows = [o.row for o in operands]

    def move_grads(self, addresses: Sequence[int]) -> None:
        self._table[::_ROW] = array("q", addresses)

    def step(
        self,
        library: ctypes.CDLL,
        chunk_of: int,
        numbers: Sequence[float],
        statistics: Statistics | None,
    ) -> None:
        scalars = (ctypes.c_float * len(numbers))(*numbers)
        counts, chunk = self.counts, library.chunk_elements()
        chunks = sum(-(-count // chunk) for count in counts)
        rows = None
        if statistics is not None:
            rows = torch.empty(chunks, len(FIELDS), dtype=torch.float64, device="cpu")
        address, total = self._table.buffer_info()[0], sum(counts)

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
            row = torch.tensor(self._rows, device="cpu")
            statistics.add(rows, row.repeat_interleave(counted))


@functools.cache
def _chunk_of(library: ctypes.CDLL, name: str, variant: int) -> int:
    """Returns the address of the function that updates a chunk by a rule."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int64)
    return int(prototype((f"rule_{name}", library))(variant))
