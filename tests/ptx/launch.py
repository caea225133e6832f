"""The GPU step without a GPU: Triton compiles the kernel, whose PTX is executed on CPU tensors."""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_s3.kernels import gpu
from megatron_s3.kernels.operands import Operands
from tests.ptx.machine import Fault, Kernel, Memory

__all__ = ["CAPABILITY", "Executed", "a_gpu_to_compile_for", "executing", "why_not"]

CAPABILITY = 90


def why_not() -> str | None:
    """Why Triton cannot compile here, or None."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if not hasattr(triton, "compile"):
        return f"triton {triton.__version__} cannot compile"
    if torch.cuda.is_available():
        return "a GPU is there, which executes the kernel itself"
    return None


class Executed:
    """Takes the place of a Triton kernel, and executes what it would have launched.

    Attributes:
        kernels: of each launch so far.
        grid: number of programs of the last launch.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known: dict[str, Kernel] = {}
        self._written: list[Tensor] = []
        self._read: list[Tensor] = []
        self.kernels: list[Kernel] = []
        self.grid = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self._launch(grid, args, options)

    def _launch(self, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, Any]) -> None:
        compiled = self._kernel.warmup(*args, grid=grid, **options)
        if hasattr(compiled, "result"):  # an asynchronous compilation's
            compiled = compiled.result()
        ptx = compiled.asm["ptx"]
        kernel = self._known.setdefault(ptx, Kernel(ptx))
        values = list(_flat(args))
        # Behind them are buffers of the compiler, which this kernel does not use.
        values += [0] * (len(kernel.parameters) - len(values))
        if len(values) != len(kernel.parameters):
            raise Fault(f"{len(values)} arguments for {len(kernel.parameters)} parameters")
        memory = self._memory(args, statistics=bool(options["STATISTICS"]))
        self.kernels.append(kernel)
        (self.grid,) = grid
        bits = [_bits(value) for value in values]
        for program in range(self.grid):
            kernel.run(program, bits, memory, compiled.metadata.shared)

    def _memory(self, args: Sequence[Any], *, statistics: bool) -> Memory:
        """The step's own tensors, and those of the launch, of which it writes the partial sums."""
        named = dict(zip(self._kernel.arg_names, args, strict=False))
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        written = [*self._written, *([tensors.pop("partials")] if statistics else [])]
        memory = Memory()
        for tensors_of, write in ((written, True), ([*self._read, *tensors.values()], False)):
            for address, size in {(t.data_ptr(), t.nbytes) for t in tensors_of}:
                memory.give(address, size, write=write)
        return memory

    def step(
        self, rule: Callable[..., Tensor], operands: Sequence[Operands], **options: Any
    ) -> None:
        """Takes a step by :func:`megatron_s3.kernels.gpu.step`, on tensors of the CPU."""
        self._give(operands)
        gpu.step(rule, operands, **options)

    def step_groups(
        self,
        rule: Callable[..., Tensor],
        groups: Sequence[Sequence[Operands]],
        rates: Sequence[tuple[Any, Any, int]],
        **numbers: Any,
    ) -> None:
        """Takes a step of several param groups by the kernel's ``Prepared``."""
        self._give([o for group in groups for o in group])
        gpu.Prepared(groups).step(rule, rates, **numbers)

    def _give(self, operands: Sequence[Operands]) -> None:
        """Lets the kernel reach the tensors of a step."""
        states = [state for o in operands for state in o.state]
        models = [o.model_param for o in operands if o.model_param is not None]
        self._written = [*(o.param for o in operands), *states, *models]
        self._read = [o.grad for o in operands]


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


def _bits(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return struct.unpack("I", struct.pack("f", value))[0]
    return int(value)


@contextmanager
def a_gpu_to_compile_for() -> Iterator[None]:
    """Within, Triton takes a GPU for the current one that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", CAPABILITY, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    name = "_active" if hasattr(driver, "_active") else "active"  # before Triton 3.4
    before = vars(driver).get(name)
    driver.set_active(device)
    try:
        yield
    finally:
        setattr(driver, name, before)


@contextmanager
def executing() -> Iterator[Executed]:
    """Within, the GPU step executes its PTX on tensors of the CPU."""
    from megatron_s3.kernels.gpu import kernel as gpu_kernel

    real = gpu_kernel.step_kernel
    gpu_kernel.step_kernel = Executed(real)
    try:
        with a_gpu_to_compile_for():
            yield gpu_kernel.step_kernel
    finally:
        gpu_kernel.step_kernel = real
