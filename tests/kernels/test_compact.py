"""Fractions and remainders: what is stored, and every kernel's bits beside the torch operations."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_s3.kernels import cpu, portable
from megatron_s3.kernels.compact import (
    FRACTION,
    REMAINDER,
    join,
    nearest_fractions,
    split,
    values_of_fractions,
)
from megatron_s3.kernels.cpu import build
from megatron_s3.kernels.operands import Operands
from megatron_s3.rules.s3 import s3_update
from tests.harness.tensors import assert_same, bits, compact, copied, numbers

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHARED = {"lr": 0.01, "weight_decay": 0.1, "beta": 0.95, "p": 3.0}
TINY = torch.finfo(FP32).tiny

needs_compiler = pytest.mark.skipif(
    isinstance(build.library_of(), str) and not (shutil.which("c++") or shutil.which("g++")),
    reason="no C++ compiler",
)


def every_bfloat16() -> torch.Tensor:
    return torch.arange(1 << 16).to(torch.int16).view(BF16)


def random_bits(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-(1 << 31), (1 << 31) - 1, (count,), generator=generator)
    return drawn.to(torch.int32).view(FP32)


def test_a_float32_number_comes_back_from_its_halves() -> None:
    """Bitwise for 4 million random patterns, and all around the ties; a NaN stays a NaN."""
    ties = (every_bfloat16().view(torch.int16).to(torch.int32) << 16) + 0x8000
    around = torch.cat([ties - 1, ties, ties + 1]).view(FP32)
    special = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F7FFFFF, -(1 << 31)], dtype=torch.int32)
    for x in (random_bits(1 << 22), around, special.view(FP32)):
        high, low = split(x)
        assert (high.dtype, low.dtype) == (BF16, REMAINDER)
        number = ~x.isnan()
        assert torch.equal(join(high, low)[number].view(torch.int32), x[number].view(torch.int32))
        assert high[~number].isnan().all()
        assert join(high, low)[~number].isnan().all()


def test_the_upper_half_is_the_nearest_bfloat16() -> None:
    """Torch's rounding, except where two are equally near: then the larger magnitude."""
    x = random_bits(1 << 20)
    x = x[x.isfinite()]
    high, low = split(x)
    tie = low == -(1 << 15)
    assert torch.equal(high[~tie], x.bfloat16()[~tie])
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])
    assert split(ties)[0].tolist() == [1 + 2**-7, 1 + 2 * 2**-7, -1 - 2**-7]


def test_codes_come_back_from_their_values() -> None:
    """From float32, and from values rounded to bfloat16, for every norm that a state can have."""
    codes = torch.arange(-127, 128).to(FRACTION)
    norms = every_bfloat16()
    norms = norms[(norms >= TINY) & norms.isfinite()]
    norms = norms[torch.randperm(len(norms), generator=torch.Generator().manual_seed(0))[:4000]]
    norms = torch.cat([norms, torch.tensor([TINY, 1.5 * TINY, 3e38]).bfloat16()])
    codes, whole = codes[:, None].expand(-1, len(norms)), norms.expand(len(codes), -1)
    values = values_of_fractions(codes, whole)
    assert (values.abs() <= whole.float()).all()
    for dtype in (FP32, BF16):
        assert torch.equal(nearest_fractions(values.to(dtype), whole), codes)


def test_values_of_special_norms() -> None:
    """NaN and inf of the norm stay, and give a NaN or inf; a norm of 0 gives 0."""
    whole = torch.tensor([math.nan, math.inf, 0.0]).bfloat16()
    values = values_of_fractions(torch.tensor([5, 5, 5]).to(FRACTION), whole)
    assert values.isnan().tolist() == [True, False, False]
    assert values[1:].tolist() == [math.inf, 0]
    assert nearest_fractions(torch.tensor([math.nan, math.nan, 0.0]), whole).tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_rounding_is_unbiased(size: float) -> None:
    """The mean of stored values over many steps is the value, within 5 standard errors."""
    steps, count = 400, 1000
    generator = torch.Generator().manual_seed(0)
    norm = torch.full((count,), size).bfloat16()
    wanted = (torch.rand(count, generator=generator) * 2 - 1) * norm
    total = torch.zeros(count, dtype=torch.float64)

    def rule(grad: torch.Tensor, m: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        m.copy_(wanted)
        return torch.zeros_like(grad)

    state = (torch.zeros(count, dtype=FRACTION), norm.clone())
    for t in range(steps):
        grad = torch.randn(count, generator=generator)  # elements get noise of their own
        given = Operands(torch.zeros(count), grad, state)
        portable.step(rule, [given], lr=0.0, weight_decay=0.0, seed=t)
        total += values_of_fractions(*state).double()
    error = (total / steps - wanted.double()) / (norm.double() / 127)
    assert error.abs().max() < 5 * 0.5 / steps**0.5
    assert error.mean().abs() < 5 * 0.5 / (steps * count) ** 0.5


def test_noise_depends_on_gradient_norm_and_step_alone() -> None:
    """Two elements with the same bits are rounded alike; each of the three changes the noise."""

    def stored(grad: float, norm: float, seed: int) -> torch.Tensor:
        g = torch.full((64,), grad)
        m, r = torch.zeros(64, dtype=FRACTION), torch.full((64,), norm)
        o = Operands(torch.zeros(64), g, (m, r))
        portable.step(s3_update, [o], seed=seed, **SHARED)
        assert len(m.unique()) == 1
        return m[0]

    given = [stored(1.0, 3.0, 1), stored(1.0, 3.0, 1)]
    assert given[0] == given[1]
    many = [
        [stored(1.0, 3.0, t) for t in range(40)],
        [stored(1.0 + t / 1e4, 3.0, 1) for t in range(40)],
        [stored(1.0, 3.0 + t / 1e4, 1) for t in range(40)],
    ]
    assert all(len(set(map(int, some))) == 2 for some in many)


@needs_compiler
@pytest.mark.parametrize("remainders", [False, True])
@pytest.mark.parametrize("norm", [FP32, BF16])
@pytest.mark.parametrize("grad", [FP32, BF16, FP16])
@pytest.mark.parametrize("count", [0, 1, 17, 64, 1009, 70001])
def test_cpu_kernel(count: int, grad: torch.dtype, norm: torch.dtype, remainders: bool) -> None:
    """Bitwise the torch operations, for three steps."""
    o = compact(count, grad=grad, norm=norm, remainders=remainders)
    assert cpu.reason(s3_update, [o], beta=0.95, p=3.0) is None
    other = copied(o)
    for t in range(3):
        cpu.step(s3_update, [o], seed=t + (1 << 24) - 2, **SHARED)
        portable.step(s3_update, [other], seed=t + (1 << 24) - 2, **SHARED)
        assert_same(o, other)
        o.grad.copy_(numbers(count, 50 + t, grad, magnitudes=3))
        other.grad.copy_(o.grad)


@needs_compiler
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("more", [{}, {"grad_bound": 2.0}, {"nesterov": False}], ids=str)
def test_cpu_kernel_with_hyperparameters(p: float, more: dict[str, object]) -> None:
    """Bitwise the torch operations."""
    o = compact(1009, remainders=True)
    other = copied(o)
    for each, module in ((o, cpu), (other, portable)):
        module.step(s3_update, [each], seed=9, **SHARED | {"p": p} | more)
    assert_same(o, other)


@needs_compiler
@pytest.mark.parametrize("module", [cpu, portable], ids=["C++", "torch"])
def test_main_parameters_are_those_of_float32(module: object) -> None:
    """With the same gradients, halves hold the bits of a float32 main parameter in every step."""
    halves = compact(1009, remainders=True, fractions=False)
    assert halves.model_param is not None
    whole = replace(copied(halves), param=join(halves.model_param, halves.param), model_param=None)
    for t in range(20):
        for o in (halves, whole):
            module.step(s3_update, [o], seed=t, **SHARED)  # type: ignore[attr-defined]
            o.grad.copy_(numbers(1009, 50 + t, magnitudes=3))
        joined = join(halves.model_param, halves.param)
        assert torch.equal(bits(joined), bits(whole.param))


@needs_compiler
@pytest.mark.parametrize("module", [cpu, portable], ids=["C++", "torch"])
def test_bfloat16_states_have_no_denormal_numbers(module: object) -> None:
    """A step stores 0 for them, and parameters and gradients keep theirs."""
    count = 100
    tiny = torch.full((count,), 3e-39)
    o = Operands(tiny.bfloat16(), torch.zeros(count), ((tiny * -1).bfloat16(), tiny.bfloat16()))
    before = o.param.clone()
    module.step(s3_update, [o], lr=0.0, weight_decay=0.0, beta=0.95, p=3.0)  # type: ignore[attr-defined]
    assert not o.state[0].any()
    assert not o.state[1].any()
    assert torch.equal(o.param, before)
    assert before.any()


def test_only_a_state_that_another_follows_may_hold_fractions() -> None:
    """Other uses of the small dtypes are no operands of a kernel."""
    o = compact(64)
    m, r = o.state
    for changed, why in (
        (replace(o, state=(m, m)), "a state of torch.int8"),
        (replace(o, state=(r, m)), "a state of torch.int8"),
        (replace(o, param=o.param.to(REMAINDER)), "a param of torch.int16"),
        (
            replace(o, param=o.param.to(REMAINDER), model_param=o.param.half()),
            "a param of torch.int16",
        ),
        (replace(o, grad=o.grad.to(FRACTION)), "a gradient of torch.int8"),
    ):
        assert why in str(cpu.reason(s3_update, [changed], beta=0.95, p=3.0))
