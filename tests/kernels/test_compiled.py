"""The machine code of the Triton kernel, which needs no GPU to be compiled."""

import pytest

from megatron_s3.kernels.compiled import CAPABILITIES, VARIANTS, compile_kernel

pytest.importorskip("triton")

#: 128-bit loads and stores of the fast loop: one for each float32 operand of 4 elements a thread.
WIDE = {
    "fp32": (4, 3),
    "bf16 gradient": (3, 3),
    "bf16 gradient and states": (1, 1),
    "fp32, p=2": (4, 3),
    "fp32, statistics": (4, 3),
    "fp32, bounded gradients": (4, 3),
    "adamw": (4, 3),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", WIDE)
def test_wide_accesses_no_spills(variant: str, capability: int) -> None:
    """Exact; a 16-bit operand of 4 elements a thread is 64 bits, as are the table's 7 fields."""
    compiled = compile_kernel(variant, capability)
    loads, stores = WIDE[variant]
    assert compiled.loads[128] == loads
    assert compiled.stores[128] == stores
    compiled_of = VARIANTS[variant]
    states = 2 * (compiled_of.state == "bf16")
    assert compiled.loads[64] == 7 + (compiled_of.grad == "bf16") + states
    statistics = 8 if compiled_of.statistics else 0  # a float64 each
    assert compiled.stores[64] == statistics + states + (compiled_of.model == "bf16")
    assert compiled.spills == 0
    assert compiled.stack == 0


@pytest.mark.parametrize("variant", ["nadam", "adan", "lion", "sgdm", "signsgd"])
def test_other_rules(variant: str) -> None:
    """Exact, but for how often the compiler writes a small rule's loop out."""
    compiled = compile_kernel(variant, 90)
    tensors = VARIANTS[variant].form.states + 2  # gradient and parameter, which is written as well
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
