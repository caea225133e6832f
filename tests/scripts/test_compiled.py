"""The machine code of the Triton kernel, which needs no GPU to be compiled."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_s3.kernels import gpu
from megatron_s3.kernels.operands import Operands
from megatron_s3.rules.adamw import adamw_update
from megatron_s3.rules.sgdm import sgdm_update
from scripts.bench.compiled import CAPABILITIES, VARIANTS, compile_kernel
from tests.ptx.launch import a_gpu_to_compile_for

triton = pytest.importorskip("triton")
from megatron_s3.kernels.gpu import kernel  # noqa: E402 (needs Triton)

#: 128-bit loads and stores of the fast loop: one for each float32 operand of 4 elements a thread.
WIDE = {
    "fp32": (4, 3),
    "bf16 gradient": (3, 3),
    "bf16 gradient and states": (1, 1),
    "fp32, p=2": (4, 3),
    "fp32, bounded gradients": (4, 3),
    "fp32, cautious": (4, 3),
    "adamw": (4, 3),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", WIDE)
def test_wide_accesses_no_spills(variant: str, capability: int) -> None:
    """Exact; a 16-bit operand of 4 elements a thread is 64 bits, as are the table's 8 fields."""
    compiled = compile_kernel(variant, capability)
    loads, stores = WIDE[variant]
    assert compiled.loads[128] == loads
    assert compiled.stores[128] == stores
    compiled_of = VARIANTS[variant]
    states = 2 * (compiled_of.state == "bf16")
    assert compiled.loads[64] == 8 + (compiled_of.grad == "bf16") + states
    assert compiled.stores[64] == states + (compiled_of.model == "bf16")
    assert compiled.spills == 0
    assert compiled.stack == 0
    assert not compiled.copies


#: Copies of the fast loop by width in bits: of 4 operands, three rounds each, and stores.
COPIED = {
    "fp32, statistics": ({128: 12}, 3),
    "bf16 gradient, statistics": ({128: 9, 64: 3}, 3),
    "bf16 states, statistics": ({128: 6, 64: 6}, 1),
    "bf16 both, statistics": ({128: 3, 64: 9}, 1),
    "bounded, statistics": ({128: 12}, 3),
    "cautious, statistics": ({128: 12}, 3),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", COPIED)
def test_with_statistics_a_multiprocessor_holds_three_programs(
    variant: str, capability: int
) -> None:
    """Exact, as ptxas assigns them: 65,536 registers, and on an RTX 4090 100 KiB of shared memory.

    For Blackwell, whose code works on pairs of numbers, ptxas spills two registers of one variant.
    """
    compiled = compile_kernel(variant, capability)
    assert compiled.registers <= 80
    assert compiled.spills == compiled.stack == 0
    assert compiled.copies == COPIED[variant][0]
    assert compiled.stores[128] == COPIED[variant][1]
    assert compiled.fused == 0
    threads = 32 * kernel.NUM_WARPS
    assert 3 * threads * compiled.registers <= 65536 < 4 * threads * compiled.registers
    assert 3 * (compiled.shared + 1024) <= 100 << 10


def test_only_statistics_limit_registers_and_only_of_small_rules() -> None:
    """A limit would cost the others a third of their threads, or spills."""
    limited = {
        name: kernel.launch_options(
            variant.form, statistics=statistics, fractions="int8" in variant.state
        ).get("maxnreg")
        for statistics in (False, True)
        for name, variant in VARIANTS.items()
        if not statistics or variant.statistics or name in ("fp32, p=2", "adan", "lion")
    }
    small = {name for name, limit in limited.items() if limit is not None}
    assert small == {*COPIED, "lion"}
    assert compile_kernel("fp32", 90).registers <= 40


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", ["int8 state, remainders", "the same, statistics"])
def test_seven_bytes(variant: str, capability: int) -> None:
    """Exact: 16 bytes of traffic an element in accesses of four elements, without spills."""
    compiled = compile_kernel(variant, capability)
    copied = variant.endswith("statistics")
    # Of gradient, parameter, remainder and exp_pnorm; and of exp_avg (and its tail in the table).
    assert (compiled.copies if copied else compiled.loads)[64] == (12 if copied else 8 + 4)
    assert compiled.stores[64] >= 3
    assert not compiled.stores.keys() & {128}
    assert compiled.spills == compiled.stack == 0


@pytest.mark.parametrize("variant", ["nadam", "adan", "lion", "sgdm", "signsgd"])
def test_other_rules(variant: str) -> None:
    """Exact, but for how often the compiler writes a small rule's loop out."""
    compiled = compile_kernel(variant, 90)
    # The gradient and the parameter, which is written as well.
    tensors = VARIANTS[variant].form.kernel.states + 2
    assert compiled.loads[128] % tensors == 0
    assert compiled.stores[128] == compiled.loads[128] // tensors * (tensors - 1)
    assert compiled.spills == compiled.stack == 0
    # Divisions and square roots are made of fused multiply-adds, as many in each of the three.
    roots = variant in ("nadam", "adan")
    assert compiled.fused == (compile_kernel("adamw", 90).fused if roots else 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_is_contracted(capability: int) -> None:
    """Exact: no fused multiply-add, so that the results are the portable path's bits.

    Correctly rounded divisions and square roots (p = 1, 2) are made of them, and stay.
    """
    assert compile_kernel("fp32", capability).fused == 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What each launch would have run, on an H100 that is not there."""
    real, found = kernel.step_kernel, []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: found.append(real.warmup(*args, grid=grid, **kwargs))

    monkeypatch.setattr(kernel, "step_kernel", Kernel())
    with a_gpu_to_compile_for():
        yield found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_rule_is_compiled_in_and_its_numbers_are_not(launched: list[Any]) -> None:
    """As the kernel is launched: of the same dtypes one compilation a rule."""
    o = Operands(*torch.ones(2, 8), tuple(torch.ones(2, 8)))
    for beta1, correction, lr in ((0.9, 0.1, 0.01), (0.0, 1.0, 1.0)):
        numbers = {"beta1": beta1, "beta2": 0.95, "eps": 1e-8}
        numbers |= {"correction1": correction, "correction2": correction}
        gpu.step(adamw_update, [o], lr=lr, weight_decay=0.0, **numbers)
    one = Operands(o.param, o.grad, o.state[:1])
    gpu.step(sgdm_update, [one], lr=1.0, weight_decay=0.1, momentum=0.9, nesterov=False)
    first, second, other = launched
    assert first is second
    assert "sqrt.rn" in first.asm["ptx"] and "sqrt" not in other.asm["ptx"]
    for compiled, numbers in ((first, 8), (other, 1)):
        assert compiled.src.signature["host_rates"] == ("fp32", "fp32")
        assert compiled.src.signature["scalars"] == ("fp32",) * numbers
        assert "fma" not in compiled.asm["ptx"]
