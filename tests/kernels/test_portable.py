"""The portable kernel: layouts, dtypes, chunks, learning rates, memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_s3.kernels import portable
from megatron_s3.kernels.operands import Operands, flatten, write_back
from megatron_s3.kernels.statistics import Statistics
from megatron_s3.rules.s3 import s3_update
from tests.harness.tensors import random

CHUNK = portable._CHUNK["cpu"]
SHARED = {"lr": 0.01, "weight_decay": 0.1, "beta": 0.95, "p": 3.0}


def steps(param: Tensor, grads: list[Tensor], **changes: object) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter and state after one step a gradient; the state is laid out as the parameter."""
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    states = [torch.zeros_like(param, dtype=dtype) for _ in range(2)]
    for grad in grads:
        operands, copies = flatten(param, grad, states)
        portable.step(s3_update, [operands], **SHARED | changes)
        write_back(copies)
    return param, *states


def same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "sliced": lambda x: torch.cat([x, x], 3)[..., ::2].copy_(x),
    "narrowed": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]].copy_(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layout_does_not_matter(layout: str, grad_layout: str) -> None:
    """Bitwise: an element's update depends on that element alone."""
    shape = (4, 3, 5, 6)
    grads = [random(*shape, seed=i) for i in range(1, 4)]
    expected = steps(random(*shape), grads)
    param = LAYOUTS[layout](random(*shape))
    strides = param.stride()
    actual = steps(param, [LAYOUTS[grad_layout](g) for g in grads])
    assert same(actual, expected)
    assert param.stride() == strides


def test_elements_beside_a_sliced_parameter_stay() -> None:
    """Bitwise: what is between a view's elements belongs to somebody else."""
    whole = random(6, 8)
    before = whole.clone()
    steps(whole[:, ::2], [random(6, 4, seed=1)])
    assert torch.equal(whole[:, 1::2], before[:, 1::2])
    assert not torch.equal(whole[:, ::2], before[:, ::2])


def test_expanded_gradient() -> None:
    """Bitwise as its copy; sum().backward() makes such gradients."""
    grad = torch.tensor([1.0, -2.0, 3.0])
    expected = steps(random(4, 3), [grad.expand(4, 3).clone()])
    assert same(steps(random(4, 3), [grad.expand(4, 3)]), expected)
    expected = steps(random(4, 3), [torch.ones(4, 3)])
    assert same(steps(random(4, 3), [torch.ones(()).expand(4, 3)]), expected)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (1, 1, 1), (1, 5, 1)])
def test_shapes_with_few_elements(shape: tuple[int, ...]) -> None:
    """Bitwise as the same elements in one dimension."""
    count = random(*shape).numel()
    x, m, r = steps(random(*shape), [random(*shape, seed=1)])
    assert x.shape == m.shape == r.shape == shape
    expected = steps(random(count), [random(count, seed=1)])
    assert same((x.reshape(-1), m.reshape(-1), r.reshape(-1)), expected)


@pytest.mark.parametrize("extra", [-1, 0, 1, CHUNK + 17])
@pytest.mark.parametrize("p", [1.5, 3.0])
def test_chunk_boundary_is_invisible(extra: int, p: float) -> None:
    """Bitwise: one tensor and the same data cut into tensors, at cuts that no chunk has."""
    count = CHUNK + extra
    grads = [random(count, seed=i) for i in range(1, 3)]
    x, m, r = steps(random(count), grads, p=p)
    cuts = [1000, 3, CHUNK // 2 + 1]
    sizes = [*cuts, count - sum(cuts)]
    parts = zip(random(count).split(sizes), *(g.split(sizes) for g in grads), strict=True)
    outcome = [steps(part.clone(), [*g], p=p) for part, *g in parts]
    assert same((x, m, r), tuple(torch.cat(tensors) for tensors in zip(*outcome, strict=True)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameter_is_the_rounded_fp32_step(dtype: torch.dtype) -> None:
    """Bitwise: one rounding, of the fp32 result; state and gradient as in fp32."""
    param, grad = random(1000, dtype=dtype), random(1000, seed=1, dtype=dtype)
    x, m, r = steps(param.float(), [grad.float()])
    assert same(steps(param, [grad]), (x.to(dtype), m, r))


def test_gradient_of_another_dtype() -> None:
    """Bitwise: bf16 gradients are widened, which is exact, before anything is computed."""
    grad = random(1000, seed=1, dtype=torch.bfloat16)
    assert same(steps(random(1000), [grad]), steps(random(1000), [grad.float()]))


def test_float64_parameter_is_computed_in_float64() -> None:
    """Two roundings of float64 at most, against the formula written out."""
    x, grad = random(100).double(), random(100, seed=1).double()
    expected = x * (1 - 0.01 * 0.1) - 0.01 * (1 - 0.95**2) ** (2 / 3) * grad.sign()
    torch.testing.assert_close(steps(x.clone(), [grad])[0], expected, rtol=0, atol=1e-15)


def test_zero_gradient_without_decay_keeps_the_parameter() -> None:
    """Bitwise, the sign of zero and denormals included."""
    x = torch.tensor([0.0, -0.0, 1e-45, -1.0, 3e38])
    before = x.clone()
    steps(x, [torch.zeros(5)] * 3, weight_decay=0.0)
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_decay_is_decoupled(dtype: torch.dtype) -> None:
    """Bitwise: without a gradient x (1 - lr wd), rounded once, and no trace of it in the state."""
    x = random(1000).to(dtype)
    expected = x * (1 - 0.01 * 0.1)
    actual, m, r = steps(x.clone(), [torch.zeros_like(x)])
    assert torch.equal(actual, expected)
    assert not m.any()
    assert not r.any()


def test_weight_decay_acts_on_the_parameter_before_the_update() -> None:
    """Bitwise: x (1 - lr wd) - lr u, each operation rounded once, u and the state as without it."""
    x, grad = random(1000), random(1000, seed=1)
    actual = steps(x.clone(), [grad], lr=0.5)
    update, *state = steps(torch.zeros(1000), [grad], lr=1.0, weight_decay=0.0)
    assert torch.equal(actual[0], x * (1 - 0.5 * 0.1) - -update * 0.5)
    assert same(actual[1:], tuple(state))


def test_learning_rate_as_a_tensor() -> None:
    """Bitwise as the number: a float64 tensor always, a float32 one without decay.

    With decay, 1 - lr wd is computed in the tensor's dtype: in float32 the factor is rounded
    twice more, so x may differ by two units in its last place.
    """
    x, grads = random(1000), [random(1000, seed=1)]
    for decay in (0.0, 0.1):
        number = steps(x.clone(), grads, weight_decay=decay)
        double = torch.tensor(0.01, dtype=torch.float64)
        assert same(steps(x.clone(), grads, lr=double, weight_decay=decay), number)
        single = steps(x.clone(), grads, lr=torch.tensor(0.01), weight_decay=decay)
        if decay == 0:
            assert same(single, number)
        else:
            torch.testing.assert_close(single[0], number[0], rtol=2 * 2.0**-23, atol=2.0**-23)


def test_statistics_are_those_of_the_updates_and_gradients() -> None:
    """Maximum and counts exact, over chunks and steps; sums as float64 sums them."""
    x, grads = random(2, CHUNK + 5), [random(2, CHUNK + 5, seed=i) for i in (1, 2)]
    for grad in grads:
        grad[0, :7] = 0
    grads[1][1, 3] = torch.inf
    grads[1][1, 4] = torch.nan
    statistics = Statistics("cpu")
    steps(x.clone(), grads, statistics=statistics, correction=4.0)
    # From 0 and with a rate of 1 the parameter becomes -u.
    probe, states = torch.zeros_like(x), [torch.zeros_like(x) for _ in range(2)]
    updates, params, moved = [], [], x.clone()
    for grad in grads:
        probe.zero_()
        operands, _ = flatten(probe, grad, states)
        portable.step(s3_update, [operands], **SHARED | {"lr": 1.0, "correction": 4.0})
        moved.mul_(1 - SHARED["lr"] * SHARED["weight_decay"]).add_(probe.view_as(x) * SHARED["lr"])
        params.append(moved.nan_to_num(0.0).double())
        updates.append(probe.abs().nan_to_num(0.0).double())
    (found,) = statistics.take()
    assert found["max_abs_update"] == max(u.max().item() for u in updates)
    assert found["zero_grads"] == 14
    assert found["nonfinite_grads"] == 2
    assert found["sum_abs_update"] == pytest.approx(sum(u.sum().item() for u in updates), rel=1e-12)
    assert found["large_updates"] == sum((u > 0.9).sum().item() for u in updates) > 0
    for name, of in (("sum_sq_update", updates), ("sum_sq_param", params)):
        assert found[name] == pytest.approx(sum(t.square().sum().item() for t in of), rel=1e-6)
    squares = sum(g[g.isfinite()].double().square().sum().item() for g in grads)
    assert found["sum_sq_grad"] == pytest.approx(squares, rel=1e-6)
    assert not any(statistics.take()[0].values())


def test_statistics_have_a_row_for_each_kind_of_parameter() -> None:
    """Chunks of one step and steps after one another: sums add up, a row's maximum is its own."""
    statistics, apart = Statistics("cpu", 3), [Statistics("cpu") for _ in range(3)]
    for row, count in ((2, 9), (0, CHUNK + 3), (2, 4)):
        tensors = [random(count, seed=row + count) for _ in range(4)]
        for target, where in ((statistics, row), (apart[row], 0)):
            copies = [t.clone() for t in tensors]
            operands, _ = flatten(copies[0], copies[1], [copies[2], copies[3].abs()], row=where)
            portable.step(s3_update, [operands], statistics=target, **SHARED)
    assert torch.equal(statistics.values, torch.cat([one.values for one in apart]))
    assert not statistics.values[1].any() and statistics.values[2].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_parameter_is_the_rounded_parameter(layout: str) -> None:
    """Bitwise, in any layout, and when it is given as flat memory."""
    shape = (4, 3, 5, 6)
    x, grad = LAYOUTS[layout](random(*shape)), random(*shape, seed=1)
    for model in (LAYOUTS[layout](torch.zeros(shape).bfloat16()), torch.zeros(360).bfloat16()):
        states = [torch.zeros_like(x) for _ in range(2)]
        operands, copies = flatten(x, grad, states, model)
        portable.step(s3_update, [operands], **SHARED)
        write_back(copies)
        if model.dim() == 1:
            order = sorted(range(4), key=x.stride, reverse=True)
            assert torch.equal(model, x.permute(order).reshape(-1).bfloat16())
        else:
            assert torch.equal(model, x.bfloat16())


def test_a_copy_in_the_model_may_have_gaps() -> None:
    """A kernel is given memory without; what lies between is not touched."""
    for x in (random(12), random(3, 4)):
        memory = torch.full((24,), 7.0).bfloat16()
        states = [torch.zeros_like(x) for _ in range(2)]
        operands, copies = flatten(x, torch.ones_like(x), states, memory[::2])
        assert operands.model_param is not None and operands.model_param.is_contiguous()
        portable.step(s3_update, [operands], **SHARED)
        write_back(copies)
        assert torch.equal(memory[::2], x.view(-1).bfloat16())
        assert memory[1::2].eq(7.0).all()


def test_states_of_lower_precision_are_rounded_once() -> None:
    """Bitwise: a step in float32 from the state as stored, then rounded to nearest even."""
    x, grad = random(1000), random(1000, seed=1)
    low = [random(1000, seed=2).bfloat16(), random(1000, seed=3).abs().to(torch.bfloat16)]
    full = [t.float() for t in low]
    one, two = x.clone(), x.clone()
    portable.step(s3_update, [flatten(one, grad.bfloat16(), low)[0]], **SHARED)
    portable.step(s3_update, [flatten(two, grad.bfloat16().float(), full)[0]], **SHARED)
    assert torch.equal(one, two)
    assert same(tuple(low), tuple(t.bfloat16() for t in full))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations allocated and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._alive:
                self._known.add(tensor.untyped_storage()._cdata)
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        return sum(size for _, size in self._alive.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [1.5, 3.0])
def test_temporaries_are_bounded_by_a_chunk(dtype: torch.dtype, p: float) -> None:
    """Exact count of live bytes: the same for 3 chunks and for 9, at most 14 fp32 chunks.

    An odd size, so that the last chunk is padded too.
    """
    peaks = []
    for count in (3 * CHUNK - 1, 9 * CHUNK - 1):
        param, grad = torch.ones(count, dtype=dtype), torch.ones(count, dtype=dtype)
        states = torch.zeros(count), torch.zeros(count)
        with LiveBytes() as live:
            portable.step(s3_update, [flatten(param, grad, states)[0]], **SHARED | {"p": p})
        assert live.now() == 0
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]
    assert 4 * CHUNK * 4 <= peaks[0] <= 14 * CHUNK * 4


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_a_rule_may_return_its_state_or_the_gradient(rate: float | Tensor) -> None:
    """Exact, with and without statistics: what a rule returns is not written to."""

    def momentum(grad: Tensor, buffer: Tensor) -> Tensor:
        return buffer.mul_(0.9).add_(grad)

    def plain(grad: Tensor, buffer: Tensor) -> Tensor:
        return grad

    for rule, expected in ((momentum, 1.9), (plain, 0.0)):
        for statistics in (None, Statistics("cpu")):
            param, grad, buffer = torch.zeros(4), torch.ones(4), torch.zeros(4)
            for _ in range(2):
                portable.step(
                    rule, [Operands(param, grad, (buffer,))], lr=rate, weight_decay=0.0,
                    statistics=statistics,
                )  # fmt: skip
            assert torch.equal(grad, torch.ones(4))
            assert torch.equal(buffer, torch.full((4,), expected))
