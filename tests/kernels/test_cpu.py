"""The C++ kernel: the same bits as the portable path, its compilation, its threads, its limits."""

import ctypes
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_s3.kernels import cpu, portable
from megatron_s3.kernels.cpu import build
from megatron_s3.kernels.operands import Operands
from megatron_s3.kernels.statistics import Statistics
from megatron_s3.optimizers.s3 import S3
from megatron_s3.rules.s3 import s3_update
from tests.harness.reference import S3Reference
from tests.harness.tensors import assert_same, bits, copied, misaligned, numbers, written

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RULE = {"beta": 0.95, "p": 3.0}
RATES = {"lr": 0.01, "weight_decay": 0.1}
SHARED = RATES | RULE
ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(
    isinstance(build.library_of(), str) and not (shutil.which("c++") or shutil.which("g++")),
    reason="no C++ compiler",
)
pytestmark = needs_compiler


def make(
    count: int,
    *,
    grad: torch.dtype = FP32,
    state: tuple[torch.dtype, torch.dtype] = (FP32, FP32),
    model_param: torch.dtype | None = None,
    seed: int = 0,
    special: bool = True,
) -> Operands:
    g = numbers(count, seed + 1, grad)
    m, r = numbers(count, seed + 2, state[0]), numbers(count, seed + 3, state[1]).abs()
    if special and count > 20:
        g[[2, 7, 9, count - 1]] = torch.tensor([math.nan, math.inf, -math.inf, -math.nan]).to(grad)
        r[[3, 4]], m[[3, 4]] = math.nan, math.nan  # with a gradient, and without
        g[4] = 0.0
        r[5], m[6] = math.inf, -math.inf
    return Operands(
        misaligned(torch.randn(count, generator=torch.Generator().manual_seed(seed))),
        misaligned(g),
        (misaligned(m), misaligned(r)),
        None if model_param is None else misaligned(torch.zeros(count, dtype=model_param)),
    )


def run(o: Operands, steps: int = 1, seed: int = 100, **changes: object) -> tuple[Operands, ...]:
    """What the kernel makes of operands, and what the portable path makes of a copy."""
    rule = {name: value for name, value in changes.items() if name not in RATES}
    assert cpu.reason(s3_update, [o], **RULE | rule) is None
    other = copied(o)
    for t in range(steps):
        if t:
            o.grad.copy_(numbers(len(o.grad), seed + t, o.grad.dtype, magnitudes=3))
            other.grad.copy_(o.grad)
        cpu.step(s3_update, [o], **SHARED | changes)
        portable.step(s3_update, [other], **SHARED | changes)
    return o, other


SIZES = (0, 1, 15, 16, 17, 31, 63, 64, 1000, 70001)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("count", SIZES)
def test_sizes(count: int, p: int) -> None:
    """Bitwise the portable path, over all of fp32, NaN and inf included, whatever the alignment."""
    assert_same(*run(make(count), p=float(p)))


@pytest.mark.parametrize("model_param", [None, FP32, BF16, FP16])
@pytest.mark.parametrize("exp_pnorm", [FP32, BF16])
@pytest.mark.parametrize("exp_avg", [FP32, BF16])
@pytest.mark.parametrize("grad", [FP32, BF16, FP16])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_dtypes(
    grad: torch.dtype,
    exp_avg: torch.dtype,
    exp_pnorm: torch.dtype,
    model_param: torch.dtype | None,
    p: float,
) -> None:
    """Bitwise the portable path: what is loaded, stored and rounded."""
    operands = make(1009, grad=grad, state=(exp_avg, exp_pnorm), model_param=model_param)
    assert_same(*run(operands, p=p))


@pytest.mark.parametrize("model_param", [None, BF16])
@pytest.mark.parametrize("grad", [FP32, BF16, FP16])
@pytest.mark.parametrize("param", [BF16, FP16])
@pytest.mark.parametrize("count", [17, 1009])
def test_half_precision_parameters(
    count: int, param: torch.dtype, grad: torch.dtype, model_param: torch.dtype | None
) -> None:
    """Bitwise the portable path: the step is computed in float32 and rounded once."""
    given = make(count, grad=grad, model_param=model_param)
    halves = replace(given, param=misaligned(numbers(count, 5, param, magnitudes=4)))
    assert_same(*run(halves, steps=3))


@pytest.mark.parametrize(
    "changes",
    [
        {"nesterov": False},
        {"beta": 0.0},
        {"beta": 0.999},
        {"beta2": 0.99},
        {"beta2": 0.99, "nesterov": False},
        {"beta2": 0.5},  # no bound
        {"beta2": 0.0},
        {"beta2": 0.0, "nesterov": False},
        {"correction": 1.7},
        {"grad_bound": 3.3},
        {"grad_bound": 3.3, "nesterov": False, "correction": 1.7},
        {"grad_bound": 1.0, "beta2": 0.0},
        {"cautious": True},
        {"cautious": True, "nesterov": False},
        {"cautious": True, "grad_bound": 3.3, "correction": 1.7},
        {"correction": 0.3, "beta2": 0.99},
        {"weight_decay": 0.0},
        {"lr": 0.0},
        {"lr": torch.tensor(0.01)},
        {"lr": torch.tensor(0.01, dtype=torch.float64)},
    ],
    ids=str,
)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_hyperparameters(p: float, changes: dict[str, object]) -> None:
    """Bitwise the portable path, also after further steps; beta2=0 forgets a NaN in exp_pnorm."""
    assert_same(*run(make(1009), p=p, **changes, steps=5))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_half_precision_gradient(dtype: torch.dtype) -> None:
    """Bitwise the portable path, for all 65536 gradients."""
    o = make(1 << 16, special=False)
    grad = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    assert_same(*run(Operands(o.param, grad, o.state)))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rounding_of_the_model_parameter(dtype: torch.dtype) -> None:
    """Bitwise torch's: ties, denormals, overflow, NaN; every 16-bit number and its neighbours."""
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).float()
    bit = 1 << (15 if dtype == BF16 else 12)  # half a unit in the last place of normal numbers
    x = torch.cat([(numbers.view(torch.int32) + k).view(FP32) for k in (0, 1, -1, bit - 1, bit)])
    x = torch.cat([x, (numbers * 1.5), numbers + 2.0**-25, numbers - 2.0**-25, numbers * 4])
    rounded = torch.empty(len(x), dtype=dtype)
    zeros = torch.zeros_like(x)
    operands = Operands(x.clone(), zeros, (zeros.clone(), zeros.clone()), rounded)
    cpu.step(s3_update, [operands], **SHARED | {"lr": 0.0})  # x - 0 u = x, NaN kept
    assert torch.equal(bits(operands.param), bits(x))
    assert torch.equal(bits(rounded), bits(x.to(dtype)))


def test_zero_and_one_chunk_and_several_tensors() -> None:
    """Bitwise as each tensor alone: empty ones between others, chunks that end and do not end."""
    sizes = (0, 5, 1 << 16, 0, (1 << 17) + 3, 1, 70001, 0)
    together = [make(n, seed=n) for n in sizes]
    alone = [copied(o) for o in together]
    assert cpu.reason(s3_update, together, **RULE) is None
    cpu.step(s3_update, together, **SHARED)
    for o, other in zip(together, alone, strict=True):
        cpu.step(s3_update, [other], **SHARED)
        assert_same(o, other)
    cpu.step(s3_update, [], **SHARED)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_do_not_matter() -> None:
    """Bitwise, statistics included: 1 thread, 3, more than there are chunks."""
    operands = [make(n, seed=n) for n in (3, 200_001, 0, 65536, 999, 131_072)]
    outcomes = []
    for count in (1, 3, 50):
        torch.set_num_threads(count)
        mine, statistics = [copied(o) for o in operands], Statistics("cpu")
        for _ in range(3):
            cpu.step(s3_update, mine, statistics=statistics, **SHARED)
        outcomes.append((mine, statistics.values))
    for others, values in outcomes[1:]:
        assert torch.equal(values, outcomes[0][1])
        for o, other in zip(others, outcomes[0][0], strict=True):
            assert_same(o, other)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.usefixtures("threads")
def test_threads_are_kept_and_survive_a_fork() -> None:
    """The second step starts no thread; a forked process, which has none, steps all the same."""
    torch.set_num_threads(3)
    o = make(300_000)
    cpu.step(s3_update, [o], **SHARED)
    alive = threading.active_count()
    cpu.step(s3_update, [o], **SHARED)
    assert threading.active_count() == alive >= 3
    context = multiprocessing.get_context("fork")
    child = context.Process(target=cpu.step, args=(s3_update, [o]), kwargs=SHARED)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_a_kernel_is_compiled_can_have_one() -> None:
    """The thread that compiles, and would let go of the lock, is the parent's alone."""
    with build._lock:
        child = os.fork()
        if child == 0:
            os._exit(int(build._lock.locked()))
        _, status = os.waitpid(child, 0)
    assert status == 0


@pytest.mark.usefixtures("threads")
def test_arithmetic_is_ieee_where_denormals_are_flushed() -> None:
    """Bitwise as without: what some library sets in a thread does not reach the kernel."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU has no such mode")
    operands = make(1000)
    expected = copied(operands)
    cpu.step(s3_update, [expected], **SHARED)
    torch.set_flush_denormal(True)
    try:
        cpu.step(s3_update, [operands], **SHARED)
        assert (torch.tensor([1e-40]) * 1).item() == 0  # and it is as it was afterwards
    finally:
        torch.set_flush_denormal(False)
    assert_same(operands, expected)


@given(
    st.lists(
        st.tuples(st.floats(width=32), st.floats(width=32), st.floats(0, width=32)), max_size=8
    ),
    st.sampled_from([1.0, 2.0, 3.0]),
    st.one_of(st.none(), st.floats(1, 1e6)),
    st.sampled_from([0.0, 0.5, 0.95]),
    st.booleans(),
    st.booleans(),
)
def test_any_numbers(
    elements: list[tuple[float, ...]],
    p: float,
    grad_bound: float | None,
    beta: float,
    nesterov: bool,
    cautious: bool,
) -> None:
    """Bitwise the portable path: any gradient, exp_avg and exp_pnorm >= 0, NaN and inf included."""
    g, m, r = torch.tensor(elements, dtype=FP32).view(-1, 3).T.contiguous()
    o = Operands(torch.zeros_like(g), g, (m, r))
    changes = {"p": p, "grad_bound": grad_bound, "beta": beta, "nesterov": nesterov}
    assert_same(*run(o, cautious=cautious, **changes))


@pytest.mark.parametrize("grad_bound", [None, 3.3])
@pytest.mark.parametrize("grad", [FP32, BF16])
@pytest.mark.parametrize("count", [0, 1, 17, 70001, 200_000])
def test_statistics(count: int, grad: torch.dtype, grad_bound: float | None) -> None:
    """Largest and counts exact, sums to 1e-6, against the portable path's and float64's.

    The squares of these gradients exceed fp32; what is counted is the gradient before its limit.
    """
    mine, other = (make(count, grad=grad) for _ in range(2))
    statistics, expected = Statistics("cpu"), Statistics("cpu")
    cpu.step(s3_update, [mine], statistics=statistics, grad_bound=grad_bound, **SHARED)
    portable.step(s3_update, [other], statistics=expected, grad_bound=grad_bound, **SHARED)
    assert_same(mine, other)
    (statistics,), (expected,) = statistics.take(), expected.take()
    for name in ("max_abs_update", "large_updates", "zero_grads", "nonfinite_grads"):
        assert statistics[name] == expected[name]
    for name in ("sum_abs_update", "sum_sq_update", "sum_sq_param"):
        assert statistics[name] == pytest.approx(expected[name], rel=1e-6)
    squares = mine.grad[mine.grad.isfinite()].double().square().sum().item()
    assert statistics["sum_sq_grad"] == pytest.approx(squares, rel=1e-6)
    if count > 20:
        assert statistics["nonfinite_grads"] == 4
        assert statistics["max_abs_update"] == 1.0
        assert 0 < statistics["zero_grads"] < count


def test_statistics_of_several_kinds() -> None:
    """Row by row what the portable path counts."""
    mine = [replace(make(count), row=row) for count, row in ((70001, 1), (33, 0), (5, 1))]
    other = [replace(make(o.param.numel()), row=o.row) for o in mine]
    statistics, expected = Statistics("cpu", 3), Statistics("cpu", 3)
    cpu.step(s3_update, mine, statistics=statistics, **SHARED)
    portable.step(s3_update, other, statistics=expected, **SHARED)
    torch.testing.assert_close(statistics.values, expected.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("beta2", [None, 0.99])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_float64_reference(p: float, beta2: float | None, nesterov: bool) -> None:
    """300 steps within 1e-5 of the sum of |lr u|: fp32 rounding of x and of u."""
    count, lr, steps = 500, 1e-3, 300
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator)
    scale = 10 ** (torch.rand(count, generator=generator) * 12 - 8)
    reference = S3Reference(x, p=p, beta2=beta2, nesterov=nesterov, weight_decay=0.1)
    o = Operands(x.clone(), torch.empty(count), (torch.zeros(count), torch.zeros(count)))
    path = torch.zeros(count, dtype=torch.float64)
    for _ in range(steps):
        o.grad.copy_(torch.randn(count, generator=generator) * scale)
        path += lr * reference.step(o.grad, lr).abs()
        cpu.step(
            s3_update, [o], **SHARED | {"lr": lr, "p": p, "beta2": beta2, "nesterov": nesterov}
        )
    error = (o.param.double() - reference.x).abs()
    rounding = steps * 2.0**-24 * torch.maximum(x.double(), reference.x).abs()
    assert (error <= 1e-5 * path + 2 * rounding).all()
    torch.testing.assert_close(o.state[0].double(), reference.m, rtol=1e-4, atol=0)
    torch.testing.assert_close(o.state[1].double() ** p, reference.s, rtol=1e-4, atol=0)


def test_what_lies_beside_stays() -> None:
    """Bitwise: the tail of a tensor ends where it ends."""
    whole = make(117, model_param=BF16)
    part = Operands(
        whole.param[3:103], whole.grad[3:103], tuple(s[3:103] for s in whole.state),
        whole.model_param[3:103],
    )  # fmt: skip
    before = copied(whole)
    cpu.step(s3_update, [part], **SHARED)
    for tensor, old in zip(written(whole), written(before), strict=True):
        assert torch.equal(bits(tensor)[:3], bits(old)[:3])
        assert torch.equal(bits(tensor)[103:], bits(old)[103:])
        assert not torch.equal(bits(tensor)[3:103], bits(old)[3:103])


def test_optimizer_as_portable() -> None:
    """Bitwise, over steps with all options; the optimizer says which path ran."""
    outcomes = []
    for fused in (True, False):
        params = [torch.nn.Parameter(numbers(n, n, magnitudes=1)) for n in (7, 1000)]
        params.append(
            torch.nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
        )
        torch.manual_seed(0)
        params[2].data.normal_()
        optimizer = S3(params, lr=0.01, weight_decay=0.1, bias_correction=True, fused=fused)
        for t in range(4):
            for param in params:
                param.grad = numbers(param.numel(), t, magnitudes=2).view(param.shape)
            optimizer.step()
        outcomes.append([p.detach().clone() for p in params])
        assert optimizer.path == cpu.NAME if fused else optimizer.path.startswith("portable")
    for left, right in zip(*outcomes, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("saved", ["parameter", "the model's"])
def test_autograd_notices(saved: str) -> None:
    """A graph that saved the parameter, or the model's, cannot be used after the step."""
    x, model = torch.randn(10, requires_grad=True), torch.randn(10, requires_grad=True)
    y = x if saved == "parameter" else model
    loss = (y * y).sum()
    o = make(10)
    cpu.step(s3_update, [Operands(x.detach(), o.grad, o.state, model.detach())], **SHARED)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- what it cannot take ---------------------------------------------------------------------


def test_reasons() -> None:
    """One clear sentence each, nothing raised."""
    o = make(8)
    assert cpu.reason(s3_update, [o], **RULE) is None
    assert "p = 1, 2 and 3, not 1.5" in cpu.reason(s3_update, [o], beta=0.95, p=1.5)
    double, state = o.param.double(), o.state

    def reason(*args: object) -> str | None:
        return cpu.reason(s3_update, [o, Operands(*args)], **RULE)

    assert "param of torch.float64" in reason(double, o.grad, state)
    assert "gradient of torch.float64" in reason(o.param, double, state)
    assert "state of torch.float16" in reason(o.param, o.grad, (state[0].half(), state[1]))
    assert "state of torch.float64" in reason(o.param, o.grad, (state[0], double))
    assert "model_param of torch.float64" in reason(o.param, o.grad, state, double)
    assert "param on meta" in reason(o.param.to("meta"), o.grad, state)
    assert "gradient on meta" in reason(o.param, o.grad.to("meta"), state)
    strided = torch.zeros(16)[::2]
    assert "gradient that is not contiguous" in reason(o.param, strided, state)
    assert "param that is not contiguous" in reason(strided, o.grad, state)
    assert "gradient of 7 elements" in reason(o.param, o.grad[:7], state)
    assert "1 state tensors" in reason(o.param, o.grad, state[:1])
    none = torch.zeros(0)
    assert "state on meta" in reason(none, none, (none, none.to("meta")))
    none = none.to("meta")
    assert "param on meta" in cpu.reason(s3_update, [Operands(none, none, (none, none))], **RULE)


# ---- compilation -----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, a process that has not compiled anything yet, and a quick compiler."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_FLAGS", tuple("-O1" if f == "-O3" else f for f in build._FLAGS))
    return tmp_path / "cache" / "megatron_s3"


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel to copy, where a test asks which file is loaded."""
    path = tmp_path_factory.mktemp("prebuilt") / "cpu.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_FLAGS", tuple("-O1" if f == "-O3" else f for f in build._FLAGS))
        build._build(build._compiler(), path, build._source(None))
    return path


@pytest.fixture
def builds(cache: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was built; a build is a copy."""
    built = []

    def copy_there(compiler: list[str], path: Path, source: object) -> None:
        built.append(path)
        shutil.copy(prebuilt, path)

    monkeypatch.setattr(build, "_build", copy_there)
    return built


def works() -> bool:
    o = make(100)
    assert cpu.reason(s3_update, [o], **RULE) is None
    assert_same(*run(o))
    return True


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason, and step refuses."""
    monkeypatch.setenv("CXX", "/nonexistent")
    o = make(8)
    assert "no C++ compiler" in cpu.reason(s3_update, [o], **RULE)
    assert "/nonexistent" in cpu.reason(s3_update, [o], **RULE)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        cpu.step(s3_update, [o], **SHARED)


def test_failing_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler's first error; it is asked once in a process."""
    calls, script = tmp_path / "calls", tmp_path / "c++"
    script.write_text(
        f"#!/bin/sh\necho >> {calls}\necho 'cc1: note: x' >&2\n"
        "echo 'cpu.cpp:1: error: no such thing' >&2\necho 'error: second' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    for _ in range(2):
        reason = cpu.reason(s3_update, [make(8)], **RULE)
        assert reason == "the C++ compiler failed: cpu.cpp:1: error: no such thing"
    assert calls.read_text() == "\n"
    assert not list(cache.glob("*"))


def test_compiled_once(cache: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process takes the first one's file; nothing else is left in the folder."""
    assert works()
    (file,) = cache.iterdir()
    before = file.stat().st_mtime_ns
    monkeypatch.setattr(build, "_loaded", {})
    assert works()
    assert [f.stat().st_mtime_ns for f in cache.iterdir()] == [before]


def test_key(cache: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other flags (another CPU's instruction sets, another compiler) are another file."""
    assert works()
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O2"))
    monkeypatch.setattr(build, "_loaded", {})
    assert works()
    assert len(list(cache.iterdir())) == 2


def test_another_compiler_is_another_file(
    cache: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether it lies elsewhere or says of itself that it is another one now."""
    for name in ("one", "other"):
        for version in (1, 2):
            script = tmp_path / name
            script.write_text(f'#!/bin/sh\nexec c++ -DOF_VERSION={version} "$@"\n')
            script.chmod(0o755)
            monkeypatch.setenv("CXX", str(script))
            monkeypatch.setattr(build, "_loaded", {})
            assert works()
    assert len(set(builds)) == len(list(cache.iterdir())) == 4


def test_another_cpu_is_another_file(
    cache: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The compiler that is asked what -march=native stands for is told what it compiles with."""
    script = tmp_path / "c++"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-march=native*) set -- -DCPU="$KIND" "$@" ;; esac\n'
        f'exec {shutil.which("c++")} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    for kind in ("1", "2", "1"):
        monkeypatch.setenv("KIND", kind)
        monkeypatch.setattr(build, "_loaded", {})
        assert works()
    assert len(builds) == len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        "changed",
        *(pytest.param(x, marks=pytest.mark.thorough) for x in ("empty", "garbage")),
    ],
)
def test_broken_file(cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """It is compiled again, and the file replaced: whoever has it open keeps what it has."""
    assert isinstance(build.library_of(), ctypes.CDLL)
    (file,) = cache.iterdir()
    content = file.read_bytes()
    changed = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    broken = {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "garbage": b"x" * 50_000,
        "changed": changed,
    }[damage]
    file.unlink()  # what is loaded keeps its own
    file.write_bytes(broken)
    monkeypatch.setattr(build, "_loaded", {})
    with file.open("rb") as before:
        assert works()
        assert before.read() == broken
    assert len(file.read_bytes()) == len(content)


def test_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, builds: list[Path]
) -> None:
    """It is compiled, once, to a folder that is this user's alone."""
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert works()
    (folder,) = (tmp_path / "temporary").iterdir()
    assert folder.name == f"megatron-s3-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(build, "_loaded", {})
    assert works()
    assert list(folder.iterdir()) == builds
    assert len(builds) == 1


@pytest.mark.parametrize("spoil", ["mode", "link", "owner"])
def test_folder_that_others_can_write_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, builds: list[Path], spoil: str
) -> None:
    """It is compiled to a temporary folder, of which nothing stays."""
    (tmp_path / "file").write_text("")
    temporary, elsewhere = tmp_path / "temporary", tmp_path / "elsewhere"
    temporary.mkdir()
    elsewhere.mkdir(mode=0o700)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    folder = temporary / f"megatron-s3-{os.getuid()}"
    if spoil == "link":
        folder.symlink_to(elsewhere)
    elif spoil == "owner":
        folder.mkdir(mode=0o700)
        if os.getuid() != 0:
            pytest.skip("only root can give a folder to another user")
        os.chown(folder, 4242, -1)
    else:
        folder.mkdir()
        folder.chmod(0o770)
    assert works()
    assert list(temporary.iterdir()) == [folder]
    assert not list(folder.iterdir())
    assert len(builds) == 1


def test_folder_that_can_only_be_read(builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there is used: nothing is written, and no other folder is looked at."""
    assert works()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(build, "_build", refuse)
    monkeypatch.setattr(build, "sole_builder", refuse)
    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    assert works()


@pytest.mark.parametrize("how", ["none", "broken"])
def test_compiler_that_has_gone(
    builds: list[Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What was built of this source for this CPU is used without one."""
    assert works()
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setenv("CXX", "/nonexistent" if how == "none" else "false")
    assert works()
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O2"))
    assert "compiler" in cpu.reason(s3_update, [make(8)], **RULE)


@pytest.mark.parametrize("changed", ["source", "machine", "flags", "Features", "file"])
def test_without_a_compiler_no_other_kernel_is_used(
    builds: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str
) -> None:
    """A kernel of another source would step wrongly, one of another CPU end the process."""
    read = Path.read_text

    def have(sets: str) -> None:
        """Makes the system say this of the CPU: x86 calls it flags, Arm Features."""
        about = f"model name\t: one\n{changed}\t: {sets}\n"
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda path, *rest, **kw: (
                about if str(path) == "/proc/cpuinfo" else read(path, *rest, **kw)
            ),
        )

    if changed in ("flags", "Features"):
        have("fp sve")
    assert works()
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setenv("CXX", "/nonexistent")
    if changed == "source":
        source = tmp_path / "cpu.cpp"
        source.write_bytes(build._SOURCE.read_bytes() + b"\n")
        monkeypatch.setattr(build, "_SOURCE", source)
    elif changed == "machine":
        monkeypatch.setattr("platform.machine", lambda: "another")
    elif changed in ("flags", "Features"):
        have("fp")
    else:
        (file,) = builds
        content = file.read_bytes()
        file.unlink()  # what is loaded keeps its own
        file.write_bytes(content[:-1])
    assert "no C++ compiler" in cpu.reason(s3_update, [make(8)], **RULE)


def test_two_processes_at_once(tmp_path: Path) -> None:
    """One compiles into the empty folder, the other waits; both can step."""
    code = (
        "import torch; from megatron_s3.kernels import cpu; "
        "from megatron_s3.kernels.cpu import build; "
        "from megatron_s3.kernels.operands import Operands; "
        "from megatron_s3.rules.s3 import s3_update; "
        "build._FLAGS = tuple('-O0' if f == '-O3' else f for f in build._FLAGS); "
        "o = Operands(*torch.ones(2, 9), tuple(torch.zeros(2, 9))); "
        "assert cpu.reason(s3_update, [o], beta=.95, p=3) is None; "
        "cpu.step(s3_update, [o], lr=.5, weight_decay=0., beta=.95, p=3); assert o.param[8] < 1"
    )
    calls, script = tmp_path / "calls", tmp_path / "c++"
    # Builds wait for one another, so that a second one would be seen.
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*-o*) echo >> {calls}; sleep 3;; esac\nexec c++ "$@"\n'
    )
    script.chmod(0o755)
    environment = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CXX": str(script),
    }
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (file,) = (tmp_path / "cache" / "megatron_s3").iterdir()
    assert file.suffix == ".so"
    assert calls.read_text() == "\n"
    (said,) = [line for text in errors for line in text.splitlines() if "waiting" in line]
    assert f", which builds the C++ kernel: {file}" in said
    assert said.startswith(tuple(f"waiting for process {p.pid} on " for p in processes))


def test_nothing_is_compiled_at_import() -> None:
    """Importing must not start a compiler: every rank and every tool imports."""
    code = (
        "import subprocess; subprocess.run = None; from megatron_s3.kernels.cpu import build; "
        "assert build._loaded == {}"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
