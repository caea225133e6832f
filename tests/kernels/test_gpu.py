"""The Triton kernel against the portable path: on a GPU where there is one, else interpreted.

Triton's interpreter rounds float32 to bfloat16 towards zero, which compiled code does not: there,
what is stored in bfloat16 is compared with that.
"""

import importlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_s3 import S3
from megatron_s3.kernels import gpu, portable
from megatron_s3.kernels.operands import Operands
from megatron_s3.kernels.statistics import Statistics
from megatron_s3.rules.s3 import s3_update
from tests.harness.tensors import assert_same, compact, copied
from tests.kernels.rules import CASES

triton = pytest.importorskip("triton")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "beta": 0.95,
    "p": 3.0,
    "beta2": None,
    "nesterov": True,
    "correction": 1.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "p=1": {"p": 1.0},
    "p=2": {"p": 2.0},
    "no nesterov": {"nesterov": False},
    "beta2": {"beta": 0.9, "beta2": 0.95},
    "beta=0": {"beta": 0.0},
    "bounded": {"grad_bound": 1.3},
    "bounded, p=1": {"grad_bound": 1.3, "p": 1.0},
    "bounded, p=2": {"grad_bound": 1.3, "p": 2.0},
    "bounded, beta=0": {"grad_bound": 1.3, "beta": 0.0},
    "cautious, bounded": {"cautious": True, "grad_bound": 1.3},
    "correction": {"correction": 4.7, "weight_decay": 0.0},
}


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    """Without a GPU the kernel is one for the interpreter while these tests run."""
    from megatron_s3.kernels.gpu import kernel as gpu_kernel
    from megatron_s3.kernels.gpu import rules as gpu_rules

    if HAS_GPU:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.reload(gpu_rules)
        importlib.reload(gpu_kernel)
        # The interpreter takes long for each block: here loops have four rounds, and not 16.
        patch.setattr(gpu_kernel, "CHUNK", 4 * gpu_kernel.BLOCK)
        yield
    importlib.reload(gpu_rules)
    importlib.reload(gpu_kernel)


def chunk() -> int:
    from megatron_s3.kernels.gpu.kernel import CHUNK

    return CHUNK


def operands(
    count: int,
    seed: int = 0,
    *,
    grad: torch.dtype = F32,
    states: tuple[torch.dtype, torch.dtype] = (F32, F32),
    model: torch.dtype | None = None,
    offset: int = 0,
) -> Operands:
    """In the middle of training; each tensor begins ``offset`` elements into its memory."""
    generator = torch.Generator().manual_seed(seed)

    def random(dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(count, generator=generator) * scale
        return placed(values, dtype)

    def placed(values: Tensor, dtype: torch.dtype) -> Tensor:
        memory = torch.zeros(count + offset, dtype=dtype, device=DEVICE)
        memory[offset:] = values.to(dtype)
        return memory[offset:]

    x, g, m, r = random(F32), random(grad, 1e-3), random(states[0], 1e-3), random(F32, 1e-3)
    r = placed(r.abs(), states[1])
    if count > 20:
        g[3:9] = 0
        r[5] = 0
    return Operands(x, g, (m, r), None if model is None else placed(torch.zeros(count), model))


def towards_zero(x: Tensor) -> Tensor:
    return (x.float().view(torch.int32) & -65536).view(F32).bfloat16()


def check(given: list[Operands], **changes: Any) -> None:
    """S3's step; bitwise."""
    check_rule(s3_update, given, **OPTIONS | changes)


def check_rule(rule: Callable[..., Tensor], given: list[Operands], **options: Any) -> None:
    """Bitwise; a NaN is a NaN."""
    expected = [copied(o) for o in given]
    gpu.step(rule, given, **options)
    # In float32, and rounded here.
    full = [
        Operands(o.param.float(), o.grad, tuple(t.float() for t in o.state), None) for o in expected
    ]
    portable.step(rule, full, **options)
    for ours, theirs in zip(given, full, strict=True):
        pairs = [(ours.param, theirs.param), *zip(ours.state, theirs.state, strict=True)]
        if ours.model_param is not None:
            pairs.append((ours.model_param, theirs.param))
        for a, b in pairs:
            rounded = b.to(a.dtype)
            if a.dtype == BF16 and not HAS_GPU:
                rounded = towards_zero(b)
            both_nan = a.isnan() & b.isnan()
            assert torch.equal(a.masked_fill(both_nan, 0), rounded.masked_fill(both_nan, 0))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 127, 128, 129, 1025])
def test_sizes_and_variants(count: int, variant: str) -> None:
    check([operands(count)], **VARIANTS[variant])


def test_chunks_tails_offsets_and_empty_tensors_in_one_list() -> None:
    """Aligned full chunks take another loop than tails and tensors that begin off 16 bytes."""
    size = chunk()
    counts = [0, size - 1, size, size + 1, 2 * size + 17, 0, 3]
    check([operands(n, seed) for seed, n in enumerate(counts)])
    check([operands(size + 5, 1, offset=k, model=BF16) for k in (1, 2, 3)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_in_the_loop_of_full_chunks(variant: str) -> None:
    check([operands(chunk())], **VARIANTS[variant])


def test_only_what_is_aligned_takes_the_loop_of_full_chunks() -> None:
    """The table's flag: one address off 16 bytes is enough, whichever it is."""
    o = operands(64)
    off = operands(64, offset=1)
    names = ("param", "grad", "exp_avg", "exp_pnorm", "model_param")
    aligned = (o.param, o.grad, *o.state, operands(64, model=BF16).model_param)
    for index in (None, *range(len(names))):
        tensors = list(aligned)
        if index is not None:
            tensors[index] = off.param
        x, g, m, r, model = tensors
        gpu._tables.clear()
        plan = gpu._plan([Operands(x, g, (m, r), model)], x.device)
        assert plan.table[0, 4].item() == (index is None)


@pytest.mark.parametrize("grad", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("states", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("model", [None, F32, BF16, F16], ids=str)
def test_dtypes(grad: torch.dtype, states: Any, model: torch.dtype | None) -> None:
    """In both loops."""
    check([operands(chunk() + 1000, grad=grad, states=states, model=model)])


@pytest.mark.parametrize("remainders", [False, True])
def test_fractions_and_remainders(remainders: bool) -> None:
    """In both loops: bitwise what torch operations store (the interpreter's bfloat16 is cut)."""
    o = compact(chunk() + 1000, norm=F32, remainders=remainders)
    tensors = (o.param, o.grad, *o.state, *([o.model_param] if remainders else []))
    x, g, m, r, *model = (tensor.to(DEVICE) for tensor in tensors)
    o = Operands(x, g, (m, r), *model)
    other = copied(o)
    gpu.step(s3_update, [o], seed=7, **OPTIONS)
    portable.step(s3_update, [other], seed=7, **OPTIONS)
    assert_same(o, other)


@pytest.mark.parametrize("param", [BF16, F16], ids=str)
@pytest.mark.parametrize("grad", [F32, BF16], ids=str)
def test_half_precision_parameters(param: torch.dtype, grad: torch.dtype) -> None:
    """In both loops: the step is computed in float32 and rounded once."""
    o = operands(chunk() + 1000, grad=grad)
    check([replace(o, param=o.param.to(param))])


def test_extreme_magnitudes_and_non_finite_gradients() -> None:
    """Each element alone: denormals, the largest numbers, inf and NaN beside ordinary ones."""
    o = operands(1024)
    magnitudes = torch.logspace(-45, 38, 512, dtype=torch.float64).float().to(DEVICE)
    o.grad[:512] *= magnitudes / 1e-3
    o.state[1][:200] = 0
    o.state[1][256:700] *= 1e30
    o.grad[600], o.grad[601], o.grad[602] = torch.inf, -torch.inf, torch.nan
    for variant in ("paper", "p=1", "p=2", "bounded"):
        check([copied(o)], **VARIANTS[variant])


@pytest.mark.parametrize("name", CASES)
def test_other_rules(name: str) -> None:
    """In both loops: one state, two and four; denormals, the largest numbers, inf and NaN."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)
    # The interpreter's bfloat16 has no denormal numbers.
    for count, dtype, model, lowest in ((chunk(), F32, None, -44), (129, BF16, BF16, -30)):
        o = operands(count, count, grad=dtype, model=model)
        exponents = torch.empty(count).uniform_(lowest, 37, generator=generator)
        magnitudes = (10.0**exponents).to(DEVICE)
        o.grad.mul_(magnitudes)
        o.grad[20], o.grad[21], o.grad[22] = torch.inf, -torch.inf, torch.nan
        states = []
        for i, state in enumerate(case.states):
            values = torch.randn(count, generator=generator).to(DEVICE) * magnitudes.roll(i)
            states.append((values.abs() if state == "exp_avg_sq" else values).to(dtype))
        given = [replace(o, state=tuple(states))]
        check_rule(case.rule, given, lr=0.01, weight_decay=0.1, **case.hyperparameters)


def test_any_other_p_is_within_a_few_units_in_the_last_place() -> None:
    """exp2 and log2 here, pow there: a power's error is p log2(x) roundings."""
    for p, grad_bound in ((1.5, None), (2.5, 1.3), (4.0, None), (8.0, 1.3)):
        o = operands(1000)
        theirs = copied(o)
        changes = {"p": p, "grad_bound": grad_bound}
        gpu.step(s3_update, [o], **OPTIONS | changes)
        portable.step(s3_update, [theirs], **OPTIONS | changes)
        for a, b in zip((o.param, *o.state), (theirs.param, *theirs.state), strict=True):
            torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-8)


def test_learning_rate_on_the_device() -> None:
    """Bitwise as the portable path with the same tensor."""
    check([operands(1000)], lr=torch.tensor(0.01, device=DEVICE))


def test_statistics() -> None:
    """Maximum and counts exact; sums within the rounding of float32 partial sums."""
    size = chunk()
    ours = [replace(operands(size + 100, 1), row=1), operands(50, 2), replace(operands(9), row=1)]
    ours[0].grad[7], ours[0].grad[-1] = torch.inf, torch.nan
    theirs = [copied(o) for o in ours]
    one, two = Statistics(DEVICE, 2), Statistics(DEVICE, 2)
    gpu.step(s3_update, ours, statistics=one, **OPTIONS)
    portable.step(s3_update, theirs, statistics=two, **OPTIONS)
    assert two.values[1, -1] == 2
    assert not two.values[0, -1]
    for found, expected in zip(one.take(), two.take(), strict=True):
        for name in ("max_abs_update", "large_updates", "zero_grads", "nonfinite_grads"):
            assert found[name] == expected[name]
        for name in ("sum_abs_update", "sum_sq_update", "sum_sq_param", "sum_sq_grad"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert (
            torch.equal(
                a.state[0],
                b.state[0],
            )
            or a.state[0].isnan().any()
        )


def test_statistics_follow_rows_and_sizes() -> None:
    """What is cached for one step is not taken for another of the same tensors, rows or sizes."""
    long, short = chunk() + 5, 9
    for rows in ((0, 1), (1, 0)):
        for counts in ((long, short), (short, long)):
            both = list(zip(counts, rows, strict=True))
            given = [replace(operands(count), row=row) for count, row in both]
            found = gpu._statistics_rows(given, gpu._plan(given, given[0].param.device))
            assert found.tolist() == [row for count, row in both for _ in range(0, count, chunk())]


def test_what_was_used_last_is_kept() -> None:
    recent = gpu._Recent()
    for key in range(256):
        assert recent.find(key, lambda key=key: key) == key
    assert recent.find(0, lambda: "made anew") == 0
    assert recent.find(256, lambda: 256) == 256
    assert len(recent) == 256 and 0 in recent and 1 not in recent


def test_either_rate_may_be_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is not read on the host then."""
    launches, launch = [], gpu._launch
    monkeypatch.setattr(gpu, "_launch", lambda *a: (launches.append(a[4]), launch(*a)))
    on_device = torch.tensor(0.25, device=DEVICE)
    for rates in ({}, {"lr": on_device}, {"weight_decay": on_device}):
        gpu.step(s3_update, [operands(9)], **OPTIONS | rates)
    assert [rates is not None for rates in launches] == [False, True, True]
    assert launches[2].tolist() == torch.tensor([0.01, 1 - 0.01 * 0.25, 0]).tolist()


@pytest.mark.parametrize("where", ["host", "device"])
def test_groups_with_rates_of_their_own_share_a_launch(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise a launch for each; statistics too, in rows of their own."""
    launches, launch = [], gpu._launch
    monkeypatch.setattr(gpu, "_launch", lambda *a: (launches.append(a), launch(*a)))
    rates = [(0.01, 0.1, 1), (0.02, 0.0, 1), (0.5, 0.7, 2)]
    if where == "device":
        rates[1] = (torch.tensor(0.02, device=DEVICE), 0.0, 1)
    numbers = {"beta": 0.95, "p": 3.0}
    found = []
    for together in (True, False):
        groups = [
            [replace(operands(n, 3 * n + i), row=i) for n in (9, chunk() + 5)] for i in range(3)
        ]
        statistics = Statistics(DEVICE, 3)
        launches.clear()
        if together:
            gpu.Prepared(groups).step(s3_update, rates, statistics, **numbers)
        else:
            for group, pair in zip(groups, rates, strict=True):
                gpu.Prepared([group]).step(s3_update, [pair], statistics, **numbers)
        assert len(launches) == (1 if together else 3)
        tensors = [t for group in groups for o in group for t in (o.param, *o.state)]
        found.append([*tensors, statistics.values])
    assert all(map(torch.equal, *found))
    starts = [operands(9, 27 + i).param for i in range(3)]
    assert not any(map(torch.equal, starts, found[0][::6]))


def test_a_graph_is_captured_of_what_was_stepped_and_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host's part of it, with tensors of any device."""
    monkeypatch.setattr(gpu, "_unavailable", lambda: None)
    monkeypatch.setattr(gpu, "_broken", lambda: None)
    monkeypatch.setattr(gpu, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "fault", lambda *args: None)
    monkeypatch.setattr(gpu, "_captured", [])
    for name in ("_tables", "_chunks", "_statistics"):
        monkeypatch.setattr(gpu, name, gpu._Recent())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    given = [operands(100), operands(100, grad=BF16)]  # two launches
    device = given[0].param.device

    def why() -> str | None:
        return gpu.reason(s3_update, given, beta=0.95, p=3.0)

    assert "has not yet stepped these tensors" in why()
    gpu._plan(given[:1], device)
    assert "has not yet stepped these tensors" in why()
    gpu._plan(given[1:], device)
    assert why() is None
    gpu._chunks.clear()
    assert "has not yet stepped these tensors" in why()
    # What a graph reads is kept, whatever else is stepped.
    table, chunks, rows = torch.zeros(1, 8), torch.zeros(1, 2), torch.zeros(1)
    monkeypatch.setattr(gpu, "_make_table", lambda *args: table)
    monkeypatch.setattr(gpu, "_make_chunks", lambda *args: chunks)
    cuda = torch.device("cuda", 0)
    plan = gpu._plan(given[:1], cuda)
    assert plan.table is table and plan.chunks is chunks
    on_cuda = Namespace(chunks=Namespace(device=cuda))
    gpu._statistics[(cuda, (0,), (100,))] = rows
    assert gpu._statistics_rows(given[:1], on_cuda) is rows
    assert gpu._captured[-2] is plan and gpu._captured[-1] is rows


def test_one_launch_a_combination_of_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    launch = gpu._launch
    monkeypatch.setattr(gpu, "_launch", lambda *a, **k: (launches.append(a[1]), launch(*a, **k)))
    gpu.step(s3_update, [operands(n, n) for n in range(1, 300, 7)], **OPTIONS)
    assert len(launches) == 1
    gpu.step(s3_update, [operands(9), operands(9, grad=BF16), operands(8, grad=BF16)], **OPTIONS)
    assert len(launches) == 3
    assert len(gpu._by_dtypes([operands(9, model=model) for model in (None, BF16, F32)])) == 3


def test_the_table_is_rebuilt_when_a_tensor_moves() -> None:
    o = operands(100)
    check([o])
    moved = Operands(o.param.clone(), o.grad, o.state, None)
    tables, chunks = dict(gpu._tables), dict(gpu._chunks)
    check([moved])
    assert len(set(gpu._tables) - set(tables)) == 1
    assert set(gpu._chunks) == set(chunks)
    tables = dict(gpu._tables)
    check([moved])
    assert set(gpu._tables) == set(tables)


@pytest.mark.parametrize("moved", ["param", "grad", "model_param", "exp_avg", "exp_pnorm"])
def test_a_step_follows_each_tensor_that_moves(moved: str) -> None:
    o = operands(100, model=BF16)
    check([o])
    if moved in ("exp_avg", "exp_pnorm"):
        m, r = o.state
        new = replace(o, state=(m.clone(), r) if moved == "exp_avg" else (m, r.clone()))
    else:
        new = replace(o, **{moved: getattr(o, moved).clone()})
    check([new])


def test_autograd_notices_what_was_written() -> None:
    o = operands(100, model=BF16)
    written = [o.param, o.model_param]
    before = [tensor._version for tensor in written]
    gpu.step(s3_update, [o], **OPTIONS)
    assert all(tensor._version > old for tensor, old in zip(written, before, strict=True))


def test_reasons() -> None:
    cpu = Operands(torch.zeros(3), torch.zeros(3), (torch.zeros(3), torch.zeros(3)))
    assert "cannot take a param on cpu" in gpu.reason(s3_update, [cpu], beta=0.95, p=3.0)
    double = Operands(torch.zeros(3).double(), cpu.grad, cpu.state)
    assert "a param of torch.float64" in gpu.reason(s3_update, [double], beta=0.95, p=3.0)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_a_step_in_a_cuda_graph_follows_the_learning_rate() -> None:
    """Bitwise: replays with another learning rate equal steps outside of a graph."""
    lr = torch.tensor(0.01, device="cuda")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(100_000, generator=generator).cuda()
    one, two = (torch.nn.Parameter(start.clone()) for _ in range(2))
    grad = torch.randn(100_000, generator=generator).cuda()
    one.grad, two.grad = grad, grad.clone()
    graphed, plain = S3([one], lr=lr, fused=True), S3([two], lr=0.01, fused=False)
    graphed.step()
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    for rate in (0.02, 0.005):
        lr.fill_(rate)
        plain.param_groups[0]["lr"] = lr.clone()
        graph.replay()
        plain.step()
        assert torch.equal(one, two)
