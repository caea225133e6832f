"""The PTX of the GPU step against the portable step, bit for bit, as the hardware rounds.

Triton's own interpreter runs the kernel's Python, and rounds to bfloat16 towards zero; here what
Triton compiled is executed, loops with asynchronous copies included.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_s3.kernels import gpu, portable
from megatron_s3.kernels.operands import Operands
from megatron_s3.kernels.statistics import FIELDS, Statistics
from megatron_s3.rules.s3 import s3_update
from scripts.acceptance.kernels import OPTIONS, VARIANTS, Case, Placed, compare, counted
from scripts.acceptance.kernels import _cases as combinations
from tests.harness.tensors import assert_same, compact, copied
from tests.harness.trainer import brief
from tests.kernels.rules import CASES
from tests.ptx import launch
from tests.ptx.machine import Fault

pytestmark = pytest.mark.skipif(bool(launch.why_not()), reason=launch.why_not() or "")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CHUNK = 16384
NUMBERS = {"beta": 0.95, "p": 3.0}
#: Elements, and by how many a tensor lies off 256 bytes: the masked loop, and both.
PLACES = ((1, 0), (129, 1), (CHUNK + 3, 0), (CHUNK + 1, 2))


@pytest.fixture
def executed() -> Iterator[launch.Executed]:
    with launch.executing() as found:
        yield found


def placed(case: Case) -> list[Placed]:
    return [Placed(count, case, "cpu", offset=offset, seed=offset) for count, offset in PLACES]


def fault(executed: launch.Executed, case: Case, **changes: Any) -> str | None:
    """What is wrong with a step, judged as the acceptance judges a GPU's."""
    options = OPTIONS | changes
    given = placed(case)
    executed.step(s3_update, [one.operands for one in given], **options)
    found = (compare(one, interpreted=False, device="cpu", **options) for one in given)
    return next(filter(None, found), None)


def check(
    executed: launch.Executed, rule: Callable[..., Tensor], given: Sequence[Operands], **options
) -> None:
    """Bitwise the portable step, rounded once; a NaN is a NaN."""
    # In float32, and rounded here.
    full = [
        Operands(o.param.float(), o.grad, tuple(t.float() for t in o.state), None)
        for o in map(copied, given)
    ]
    executed.step(rule, given, **options)
    portable.step(rule, full, **options)
    for ours, theirs in zip(given, full, strict=True):
        pairs = [(ours.param, theirs.param), *zip(ours.state, theirs.state, strict=True)]
        if ours.model_param is not None:
            pairs.append((ours.model_param, theirs.param))
        for a, b in pairs:
            rounded = b.to(a.dtype)
            wrong = (a != rounded) & ~(a.isnan() & rounded.isnan())
            assert not wrong.any(), f"{int(wrong.sum())} of {a.numel()} elements of {a.dtype}"


BY_NAME = {str(case): case for case in combinations(True)}


@pytest.mark.parametrize("name", brief(BY_NAME, str(Case()), str(Case(*[BF16] * 4))))
def test_dtypes(executed: launch.Executed, name: str) -> None:
    """In both loops, and nothing is touched beside the tensors."""
    assert fault(executed, BY_NAME[name]) is None
    assert executed.grid == 6


EXACT = [name for name, changes in VARIANTS.items() if changes.get("p", 3.0) in (1, 2, 3)]


@pytest.mark.parametrize("variant", brief(EXACT, "bounded", "cautious"))
def test_variants(executed: launch.Executed, variant: str) -> None:
    assert fault(executed, Case(), **VARIANTS[variant]) is None


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        (Case(), ""),
        pytest.param(Case(BF16, BF16, BF16, BF16), "", marks=pytest.mark.thorough),
        pytest.param(Case(F16, BF16, F32, None), "", marks=pytest.mark.thorough),
        pytest.param(Case(), "bounded", marks=pytest.mark.thorough),
        pytest.param(Case(), "p=2", marks=pytest.mark.thorough),
        pytest.param(Case(), "p=1", marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_statistics(executed: launch.Executed, case: Case, variant: str) -> None:
    """They change no bit; counts and the maximum are exact.  Loads are copied ahead."""
    options = OPTIONS | VARIANTS.get(variant, {})
    assert counted(executed, placed(case), **options) is None
    silent, counting = executed.kernels
    assert any(name.startswith("cp.async") for name in counting.executed)
    assert not any(name.startswith("cp.async") for name in silent.executed)


@pytest.mark.parametrize("place", brief(map(str, range(4)), "1", "2"))
def test_the_largest_update_is_found_wherever_it_is(executed: launch.Executed, place: str) -> None:
    """One of the four elements of a thread, in either loop."""
    for count in (CHUNK, 100):
        o = Operands(torch.ones(count), torch.zeros(count), (torch.zeros(count),) * 2)
        o = replace(o, state=(torch.zeros(count), torch.zeros(count)))
        o.grad[40 + int(place)] = 1e-3
        statistics = Statistics("cpu")
        executed.step(s3_update, [o], statistics=statistics, **OPTIONS)
        (found,) = statistics.take()
        update = (0.999 - o.param[40 + int(place)]).item() / 0.01
        assert found["max_abs_update"] == pytest.approx(update, rel=1e-4)
        assert found["sum_abs_update"] == found["max_abs_update"] > 0
        assert found["zero_grads"] == count - 1
        assert found["large_updates"] == (update > 0.9) and found["nonfinite_grads"] == 0
        assert set(found) == set(FIELDS)


@pytest.mark.parametrize("variant", brief(["", "p=1", "p=2", "bounded"], ""))
def test_extreme_magnitudes_and_what_is_not_finite(executed: launch.Executed, variant: str) -> None:
    o = Placed(1024, Case(), "cpu").operands
    magnitudes = torch.logspace(-45, 38, 512, dtype=torch.float64).float()
    o.grad[:512] = torch.randn(512, generator=torch.Generator().manual_seed(0)) * magnitudes
    o.state[0][:100] = 0
    o.state[1][:200] = 0
    o.state[1][256:700] *= 1e30
    o.grad[600], o.grad[601], o.grad[602] = torch.inf, -torch.inf, torch.nan
    check(executed, s3_update, [o], **OPTIONS | VARIANTS.get(variant, {}))


def test_groups_with_rates_of_their_own(executed: launch.Executed) -> None:
    """One launch, and the bits of a step a group."""
    rates = [(0.01, 0.1, 1), (0.02, 0.0, 2), (0.5, 0.7, 3)]
    groups = [[Placed(300, Case(), "cpu", seed=i).operands] for i in range(3)]
    alone = [[copied(o) for o in group] for group in groups]
    executed.step_groups(s3_update, groups, rates, **NUMBERS)
    assert len(executed.kernels) == 1
    for (ours,), (theirs,), (lr, decay, _) in zip(groups, alone, rates, strict=True):
        portable.step(s3_update, [theirs], lr=lr, weight_decay=decay, **NUMBERS)
        for a, b in zip((ours.param, *ours.state), (theirs.param, *theirs.state), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("param", [pytest.param(BF16, marks=pytest.mark.thorough), F16], ids=str)
def test_half_precision_parameters(executed: launch.Executed, param: torch.dtype) -> None:
    o = Placed(CHUNK + 5, Case(model=None), "cpu").operands
    check(executed, s3_update, [replace(o, param=o.param.to(param))], **OPTIONS)


@pytest.mark.parametrize("remainders", [False, pytest.param(True)])
def test_fractions_and_remainders(executed: launch.Executed, remainders: bool) -> None:
    """In both loops, for groups with seeds of their own: bitwise what torch operations store."""
    rates = [(0.01, 0.1, 3), (0.02, 0.0, (1 << 24) - 1)]
    groups = [[compact(n, grad=BF16, remainders=remainders)] for n in (129, CHUNK + 77)]
    alone = [[copied(o) for o in group] for group in groups]
    executed.step_groups(s3_update, groups, rates, **NUMBERS)
    assert len(executed.kernels) == 1
    for (ours,), (theirs,), (lr, decay, seed) in zip(groups, alone, rates, strict=True):
        portable.step(s3_update, [theirs], lr=lr, weight_decay=decay, seed=seed, **NUMBERS)
        assert_same(ours, theirs)


@pytest.mark.thorough
def test_rates_on_the_device(executed: launch.Executed) -> None:
    o = Placed(CHUNK + 5, Case(), "cpu").operands
    rates = {"lr": torch.tensor(0.01), "weight_decay": torch.tensor(0.1)}
    check(executed, s3_update, [o], **OPTIONS | rates)


@pytest.mark.parametrize("name", brief(CASES, "adamw"))
def test_other_rules(executed: launch.Executed, name: str) -> None:
    """In both loops; divisions and square roots are the correctly rounded ones."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)
    o = Placed(CHUNK + 77, Case(model=BF16), "cpu").operands
    states = [torch.randn(len(o.param), generator=generator) for _ in case.states]
    nonnegative = [
        value.abs() if state == "exp_avg_sq" else value
        for state, value in zip(case.states, states, strict=True)
    ]
    given = [replace(o, state=tuple(nonnegative))]
    check(executed, case.rule, given, lr=0.01, weight_decay=0.1, **case.hyperparameters)


# ---- that it can fail ----------------------------------------------------------------------------


def test_an_access_behind_a_tensor_is_found(executed: launch.Executed, monkeypatch) -> None:
    """The table says one element more than there is."""
    real = gpu._make_table

    def longer(*args) -> Tensor:
        table = real(*args)
        table[:, 3] += 1
        return table

    monkeypatch.setattr(gpu, "_make_table", longer)
    gpu._tables.clear()
    one = Placed(129, Case(model=None), "cpu").operands
    with pytest.raises(Fault, match="outside of what was given, by 1 lanes"):
        executed.step(s3_update, [one], **OPTIONS)
    gpu._tables.clear()


def altered(executed: launch.Executed, change: Callable[[str], str]) -> None:
    """Has the machine execute other PTX than Triton made."""
    real = executed._kernel

    class Changed:
        arg_names = real.arg_names

        def warmup(self, *args, **options) -> Any:
            made = real.warmup(*args, **options)
            text = change(made.asm["ptx"])
            assert text != made.asm["ptx"]
            return type("Compiled", (), {"asm": {"ptx": text}, "metadata": made.metadata})

    executed._kernel = Changed()


def test_one_constant_of_the_cube_root_makes_a_difference(executed: launch.Executed) -> None:
    """The last bit of one coefficient."""
    bits = int(np.float32(0.22221696376800537).view(np.uint32))
    altered(executed, lambda ptx: ptx.replace(f"0f{bits:08X}", f"0f{bits + 1:08X}"))
    assert "is not bitwise the portable step's" in fault(executed, Case())


def test_a_fused_multiply_add_is_refused(executed: launch.Executed) -> None:
    def fuse(ptx: str) -> str:
        pattern = r"add\.rn\.f32 \t(%\w+), (%\w+), (%\w+);"
        return re.sub(pattern, r"fma.rn.f32 \t\1, \2, \2, \3;", ptx, count=1)

    altered(executed, fuse)
    with pytest.raises(Fault, match="not known: fma"):
        fault(executed, Case())
