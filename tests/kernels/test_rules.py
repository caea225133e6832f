"""The C++ kernel's other rules: bitwise the portable path's, and which rules have a kernel at all.

What all rules share (threads, chunks, rounding, compilation) is tested with S3 in test_cpu.
"""

import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_s3.kernels import cpu, gpu, portable
from megatron_s3.kernels.cpu import build
from megatron_s3.kernels.operands import Operands, fault
from megatron_s3.kernels.statistics import Statistics
from megatron_s3.optimizers import OPTIMIZERS, AdamW, ElementwiseOptimizer
from megatron_s3.optimizers.description import Description
from tests.harness.tensors import assert_same, bits, copied, misaligned, numbers
from tests.kernels.rules import CASES, Case

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RATES = {"lr": 0.01, "weight_decay": 0.1}

pytestmark = pytest.mark.skipif(
    isinstance(build.library_of(), str) and not (shutil.which("c++") or shutil.which("g++")),
    reason="no C++ compiler",
)


def make(
    case: Case,
    count: int,
    *,
    grad: torch.dtype = FP32,
    state: torch.dtype = FP32,
    model_param: torch.dtype | None = None,
    seed: int = 0,
) -> Operands:
    """Of all magnitudes, NaN and inf among them, one element off what the allocator aligned."""
    g = numbers(count, seed + 1, grad)
    states = [numbers(count, seed + 2 + i, state) for i in range(len(case.states))]
    for name, tensor in zip(case.states, states, strict=True):
        if name == "exp_avg_sq":
            tensor.abs_()
    if count > 20:
        g[[2, 7, 9, count - 1]] = torch.tensor([math.nan, math.inf, -math.inf, -math.nan]).to(grad)
        for i, tensor in enumerate(states):
            tensor[[3 + 2 * i, 4 + 2 * i]] = torch.tensor([math.nan, math.inf]).to(state)
    param = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    model = None if model_param is None else misaligned(torch.zeros(count, dtype=model_param))
    return Operands(misaligned(param), misaligned(g), tuple(map(misaligned, states)), model)


def check(case: Case, given: list[Operands], steps: int = 1, **changes: object) -> None:
    """The kernel's bits are the portable path's, in all that is written."""
    values = case.hyperparameters | changes
    assert cpu.reason(case.rule, given, **values) is None
    expected = [copied(o) for o in given]
    for t in range(steps):
        if t:
            for o, other in zip(given, expected, strict=True):
                o.grad.copy_(numbers(len(o.grad), t, o.grad.dtype, magnitudes=3))
                other.grad.copy_(o.grad)
        cpu.step(case.rule, given, **RATES, **values)
        portable.step(case.rule, expected, **RATES, **values)
    for o, other in zip(given, expected, strict=True):
        assert_same(o, other)


@pytest.mark.parametrize("name", CASES)
def test_sizes(name: str) -> None:
    """Every tail, chunks that end and do not end, in one step; and three steps on."""
    case = CASES[name]
    check(case, [make(case, n, seed=n) for n in (0, 1, 15, 16, 17, 63, 64, 65, 1000, 70001)])
    check(case, [make(case, 1000)], steps=3)


@pytest.mark.parametrize("name", CASES)
def test_dtypes(name: str) -> None:
    """What is loaded, stored and rounded."""
    case = CASES[name]
    for grad in (FP32, BF16, FP16):
        for state in (FP32, BF16):
            for model in (None, FP32, BF16, FP16):
                check(case, [make(case, 333, grad=grad, state=state, model_param=model)])
        for param in (BF16, FP16):
            o = make(case, 333, grad=grad)
            check(case, [replace(o, param=o.param.to(param))])


number = st.floats(width=32)


@pytest.mark.parametrize("name", CASES)
@given(
    st.lists(st.tuples(number, number, number, number, st.floats(0, width=32)), max_size=8),
    st.sampled_from([0.0, 0.5, 0.999]),
)
def test_any_numbers(name: str, elements: list[tuple[float, ...]], beta: float) -> None:
    """Any gradient and states, averages of squares >= 0; coefficients 0 and near 1."""
    case = CASES[name]
    g, *signed, square = torch.tensor(elements, dtype=FP32).view(-1, 5).T.contiguous()
    states = tuple(
        square if name == "exp_avg_sq" else signed[i] for i, name in enumerate(case.states[:3])
    )
    states += tuple(g.clone() for _ in case.states[3:])
    changes = {key: beta for key in case.hyperparameters if key in ("beta1", "momentum")}
    check(case, [Operands(torch.zeros_like(g), g, states)], **changes)


@pytest.mark.parametrize("name", CASES)
def test_statistics(name: str) -> None:
    """Largest and counts exact, sums to 1e-6, row by row what the portable path counts."""
    case = CASES[name]
    mine = [replace(make(case, n), row=row) for n, row in ((70001, 1), (33, 0))]
    other = [copied(o) for o in mine]
    other = [replace(o, row=m.row) for o, m in zip(other, mine, strict=True)]
    found, expected = Statistics("cpu", 2), Statistics("cpu", 2)
    cpu.step(case.rule, mine, statistics=found, **RATES, **case.hyperparameters)
    portable.step(case.rule, other, statistics=expected, **RATES, **case.hyperparameters)
    for o, reference in zip(mine, other, strict=True):
        assert_same(o, reference)
    for ours, theirs in zip(found.take(), expected.take(), strict=True):
        for key in ("max_abs_update", "large_updates", "zero_grads", "nonfinite_grads"):
            assert ours[key] == theirs[key]
        for key in ("sum_abs_update", "sum_sq_update", "sum_sq_param", "sum_sq_grad"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6)
        assert ours["nonfinite_grads"] == 4


@pytest.mark.parametrize("name", ["adan", "lion"])
def test_what_lies_beside_stays(name: str) -> None:
    """Bitwise: with four states and with one the tail of a tensor ends where it ends."""
    case = CASES[name]
    whole = make(case, 117, model_param=BF16)
    within = slice(3, 103)
    states = tuple(tensor[within] for tensor in whole.state)
    before = copied(whole)
    part = Operands(whole.param[within], whole.grad[within], states, whole.model_param[within])
    cpu.step(case.rule, [part], **RATES, **case.hyperparameters)
    tensors = zip(
        (whole.param, *whole.state, whole.model_param),
        (before.param, *before.state, before.model_param),
        strict=True,
    )
    for new, old in tensors:
        assert torch.equal(bits(new)[:3], bits(old)[:3])
        assert torch.equal(bits(new)[103:], bits(old)[103:])
        assert not torch.equal(bits(new)[within], bits(old)[within])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_it(name: str) -> None:
    """Bitwise as with fused=False over steps; the optimizer says which path ran."""
    cls, outcomes = OPTIMIZERS[name], []
    for fused in (None, False):
        params = [torch.nn.Parameter(numbers(n, n, magnitudes=1)) for n in (7, 1000)]
        optimizer = cls(params, lr=0.01, weight_decay=0.1, fused=fused)
        for t in range(4):
            for param in params:
                param.grad = numbers(param.numel(), t, magnitudes=2)
            optimizer.step()
        outcomes.append([p.detach() for p in params])
        assert optimizer.path == (cpu.NAME if fused is None else "portable: fused=False")
    for left, right in zip(*outcomes, strict=True):
        assert torch.equal(left, right)


# ---- which rules there are -----------------------------------------------------------------------


def own_update(grad: Tensor, exp_avg: Tensor, *, beta: float) -> Tensor:
    """A user's."""
    return exp_avg.mul_(beta).add_(grad * (1 - beta)).tanh()


class Mine(ElementwiseOptimizer):
    description = Description("mine", "mine", ("exp_avg",), clip_grad=1.0, rule=own_update)

    def group_hyperparameters(self, group: dict) -> dict:
        return {"beta": 0.9}


def test_a_users_own_rule_stays_portable_and_why_is_said() -> None:
    reason = "the C++ kernel does not have own_update"
    for fused in (None, True):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = Mine([param], lr=0.1, fused=fused)
        if fused:
            with pytest.raises(RuntimeError, match=f"fused=True, but {re.escape(reason)}"):
                optimizer.step()
            assert torch.equal(param, torch.ones(3))
        else:
            optimizer.step()
            assert optimizer.path == f"portable: {reason}"
            assert not torch.equal(param, torch.ones(3))
    assert gpu.reason(own_update, [], beta=0.9) == "the Triton kernel does not have own_update"


def test_a_state_too_few_is_said() -> None:
    case = CASES["adan"]
    three = make(replace(case, states=case.states[:3]), 8)
    reason = cpu.reason(case.rule, [three], **case.hyperparameters)
    assert reason == "the C++ kernel cannot take 3 state tensors where its rule has 4"


def test_parameters_in_float64_stay_portable() -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    optimizer = AdamW([param])
    optimizer.step()
    assert optimizer.path == "portable: the C++ kernel cannot take a param of torch.float64"


def test_each_fault_of_an_operand_is_named() -> None:
    """The first one, in the order of param, gradient, states and the copy in the model."""
    x = torch.zeros(3)
    good = {"param": x, "grad": x, "state": (x, x), "model_param": x.bfloat16()}
    meta, wide = torch.zeros(3, device="meta"), torch.zeros(6)[::2]
    for changes, expected in (
        ({}, None),
        ({"state": (x,)}, "1 state tensors where its rule has 2"),
        ({"param": x.double()}, "a param of torch.float64"),
        ({"param": meta}, "a param on meta"),
        ({"grad": x.to(torch.int8)}, "a gradient of torch.int8"),
        ({"grad": meta}, "a gradient on meta"),
        ({"grad": wide}, "a gradient that is not contiguous"),
        ({"state": (x, torch.zeros(4))}, "a state of 4 elements with a param of 3"),
        ({"state": (x.to(torch.int8), x)}, None),
        ({"state": (x, x.to(torch.int8))}, "a state of torch.int8"),
        ({"param": x.to(torch.int16)}, None),
        ({"param": x.to(torch.int16), "model_param": None}, "a param of torch.int16"),
        (
            {"model_param": torch._neg_view(x)},
            "a model_param whose elements are not in its memory (negated view)",
        ),
    ):
        assert fault([Operands(**good), Operands(**good | changes)], "cpu", 2) == expected
    assert fault([Operands(**good)], "cuda", 2) == "a param on cpu"
