"""Tensors without memory of their own, in shared memory, and of kinds that no kernel takes."""

import logging
from random import Random
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from megatron_s3 import S3
from megatron_s3.kernels.operands import flatten
from megatron_s3.kernels.overlap import Overlaps
from megatron_s3.optimizers import OPTIMIZERS, AdamW
from megatron_s3.optimizers.step import Step
from tests.harness.tensors import random


class Wrapped(torch.Tensor):
    """Has no memory; its elements are another tensor's."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapped":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


def inner(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.inner if isinstance(tensor, Wrapped) else tensor


def test_fake_tensors_are_stepped_by_torch() -> None:
    for name in OPTIMIZERS:
        with FakeTensorMode():
            param = Parameter(torch.randn(4))
            param.grad = torch.randn(4)
            optimizer = OPTIMIZERS[name]([param], 1e-3)
            optimizer.step()
        assert "whose elements are not in its memory (FakeTensor)" in optimizer.path


@pytest.mark.parametrize("which", ["param", "grad", "state", "model_param"])
def test_a_wrapper_is_stepped_as_what_it_wraps(which: str) -> None:
    """Bitwise."""
    results = []
    for wrap in (Wrapped, lambda tensor: tensor):
        param = Parameter(random(50, seed=0))
        if which == "param":
            param = Parameter(wrap(random(50, seed=0)))
        optimizer = S3([param], lr=0.1)
        optimizer.init_state()
        state = optimizer.state[param]
        if which == "state":
            state.update({name: wrap(tensor) for name, tensor in state.items()})
        if which == "model_param":
            optimizer.host.model_params[param] = wrap(torch.zeros(50).bfloat16())
        for t in range(3):
            param.grad = None
            grad = random(50, seed=t + 1)
            param.grad = wrap(grad) if which in ("param", "grad") else grad
            optimizer.step()
        tensors = [param.detach(), *state.values(), *optimizer.host.model_params.values()]
        results.append([inner(tensor) for tensor in tensors])
        assert ("(Wrapped)" in optimizer.path) == (wrap is Wrapped)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("layout", ["gaps", "transposed"])
def test_a_wrapper_may_be_laid_out_in_any_way(layout: str) -> None:
    """Bitwise: what a step leaves in a copy is put back, though no address tells copies."""
    results = []
    for wrap in (Wrapped, lambda tensor: tensor):
        memory = random(48, seed=0).view(6, 8)
        value = memory[:, ::2] if layout == "gaps" else memory.t()
        param, before = Parameter(wrap(value)), value.clone()
        optimizer = S3([param], lr=0.1)
        for t in range(2):
            param.grad = wrap(random(value.numel(), seed=t + 1).view(value.shape))
            optimizer.step()
        results.append(inner(param.detach()))
        assert not torch.equal(results[-1], before)
    assert torch.equal(*results)


@pytest.mark.parametrize("gaps", [False, True])
def test_a_negated_view_is_read_as_what_it_is(gaps: bool) -> None:
    """Bitwise: the memory holds the numbers with the other sign."""
    results = []
    for negated in (True, False):
        param = Parameter(random(50, seed=0))
        grad = torch._neg_view(random(50, seed=1))
        if gaps:
            grad = torch.complex(random(50, seed=1), random(50, seed=2)).conj().imag
        assert grad.is_neg()
        param.grad = grad if negated else grad.clone().resolve_neg()
        S3([param], lr=0.1).step()
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("fused", [None, False])
def test_memory_that_was_freed_is_an_error(fused: bool | None) -> None:
    """Nothing is changed; torch's own operations would end the process."""
    params = [Parameter(random(50, seed=seed)) for seed in range(2)]
    for param in params:
        param.grad = random(50, seed=3)
    before = params[0].detach().clone()
    params[1].grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="gradient was freed"):
        S3(params, fused=fused).step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("fused", [None, False])
def test_a_copy_in_the_model_that_was_freed_is_an_error(fused: bool | None) -> None:
    param, copied = Parameter(random(50, seed=0)), torch.zeros(50).bfloat16()
    param.grad = random(50, seed=3)
    optimizer = S3([param], fused=fused)
    optimizer.host.model_params[param] = copied
    copied.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="copy in the model was freed"):
        optimizer.step()


def test_a_gradient_that_is_zero_without_memory_is_stepped() -> None:
    """Bitwise as zeros; autograd makes such ones in forward mode."""
    params = [Parameter(random(9, seed=0)) for _ in range(2)]
    params[0].grad, params[1].grad = torch._efficientzerotensor(9), torch.zeros(9)
    for param in params:
        S3([param], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(*params)


def test_parameters_with_one_reason_are_counted_together() -> None:
    params = [Parameter(random(9, seed=i).double()) for i in range(3)]
    params.append(Parameter(random(9, seed=3)))
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = S3(groups)
    optimizer.step()
    assert "portable for 3 of 4 parameters" in optimizer.path


def test_what_no_kernel_has_is_the_reason_for_every_parameter() -> None:
    """Whatever else a kernel could not take of some."""
    params = [Parameter(random(9, seed=0)), Parameter(random(9, seed=1).double())]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = S3(params, p=2.5)
    optimizer.step()
    assert optimizer.path == "portable: the C++ kernel has p = 1, 2 and 3, not 2.5"


COUNT = 300_000


def shared(kind: str) -> tuple[torch.Tensor, list[Parameter], list[dict[str, Any]]]:
    """One memory, and parameters in it."""
    memory = random(COUNT, seed=0)
    one = Parameter(memory)
    other = {
        "twice": one,
        "other group": one,
        "view": Parameter(memory[COUNT // 3 :]),
        "same": Parameter(memory),
        "strided": Parameter(memory[::2]),
    }[kind]
    between = Parameter(random(100, seed=1))
    groups = [{"params": [one, between, other]}]
    if kind == "other group":
        groups = [{"params": [one, between]}, {"params": []}]
    return memory, [one, between, other], groups


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("kind", ["twice", "other group", "view", "same", "strided"])
def test_parameters_in_one_memory_are_updated_in_order(kind: str) -> None:
    """As torch does it, and the same bits as one after another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    outcomes = []
    try:
        for make in (
            lambda groups: AdamW(groups, lr=0.01, beta2=0.999),
            lambda groups: AdamW(groups, lr=0.01, beta2=0.999, fused=False),
            lambda groups: AdamW(groups, lr=0.01, beta2=0.999),
            lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0, foreach=False),
        ):
            memory, params, groups = shared(kind)
            optimizer = make(groups)
            if kind == "other group":
                optimizer.param_groups[1]["params"] = [params[2]]
            for t in range(3):
                for i, param in enumerate(params):
                    param.grad = random(param.numel(), seed=10 * t + (i if i < 2 else 2))
                optimizer.step()
            outcomes.append(memory)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])
    torch.testing.assert_close(outcomes[0], outcomes[3], rtol=0, atol=1e-6)


def test_overlapping_copies_are_written_in_order() -> None:
    params = [Parameter(random(COUNT, seed=seed)) for seed in range(2)]
    optimizer = S3(params, lr=0.1)
    memory = torch.zeros(COUNT).bfloat16()
    optimizer.host.model_params = dict.fromkeys(params, memory)
    for param in params:
        param.grad = random(COUNT, seed=5)
    optimizer.step()
    assert torch.equal(memory, params[1].detach().bfloat16())


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """From the first byte of a tensor to the one after its last."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def meet(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    spans = [[extent(t) for t in tensors] for tensors in (some, others)]
    return any(a < d and c < b for a, b in spans[0] for c, d in spans[1])


@pytest.mark.parametrize("seed", range(60))
def test_a_step_is_cut_where_memory_is_shared_and_nowhere_else(seed: int) -> None:
    """Exact, by comparing everything, in steps that follow one another."""
    draw, memory = Random(seed), torch.zeros(240)

    def part(of: torch.Tensor, strided: bool = False) -> torch.Tensor:
        begin = draw.randrange(len(of) - 24)
        found = of[begin : begin + draw.randrange(1, 24)]
        return found[:: draw.choice([1, 3])] if strided else found

    views = [memory, memory.view(torch.float64)]
    params = [part(draw.choice(views), strided=True) for _ in range(6)]
    states = [[torch.zeros_like(p), torch.zeros_like(p)] for p in params]
    models: list[torch.Tensor | None] = []
    for param in params:
        begin, half = draw.randrange(400), memory.view(torch.bfloat16)
        shared, own = half[begin : begin + len(param)], torch.zeros(len(param)).bfloat16()
        models.append(draw.choice([None, shared, own]))
    overlaps, counts = Overlaps(), {False: 0, True: 0}
    grads = [torch.zeros(len(p)) for p in params]
    chosen: list[int] = []
    for _ in range(40):
        for i in range(6):
            if draw.random() < 0.3:
                grads[i] = torch.zeros(len(params[i]))
            elif draw.random() < 0.1:
                begin = draw.randrange(240 - 24)
                grads[i] = memory[begin : begin + len(params[i])]
        if not chosen or draw.random() < 0.7:
            chosen = draw.choices(range(6), k=draw.randrange(1, 4))
        cuts, begin = [], 0
        for at, i in enumerate(chosen):
            for j in chosen[begin:at]:
                wrote, writes = (
                    [params[k], *states[k], *([] if models[k] is None else [models[k]])]
                    for k in (j, i)
                )
                if meet(wrote, [*writes, grads[i]]) or meet([grads[j]], writes):
                    cuts.append(at)
                    begin = at
                    break
        flat = [flatten(params[i], grads[i], states[i], models[i]) for i in chosen]
        assert overlaps.cuts(flat) == cuts
        counts[bool(cuts)] += 1
    assert min(counts.values()) > 2


def test_what_has_moved_onto_a_gradient_is_seen_in_each_step() -> None:
    memory, overlaps = torch.zeros(90), Overlaps()
    params, grads = [*torch.zeros(2, 10)], [memory[:10], torch.zeros(10)]
    states = [[torch.zeros(10)], [torch.zeros(10)]]

    def cuts() -> list[int]:
        return overlaps.cuts([flatten(*each) for each in zip(params, grads, states, strict=True)])

    assert cuts() == cuts() == []
    params[1] = memory[5:15]
    assert cuts() == cuts() == cuts() == [1]


def test_what_lies_apart_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards beside one another in a buffer are not taken for one another."""
    buffer, copies = random(400, seed=0), torch.zeros(400).bfloat16()
    params = [Parameter(part) for part in buffer.split(100)]
    optimizer = S3(params)
    optimizer.host.model_params = dict(zip(params, copies.split(100), strict=True))
    calls = []
    call = Step.call
    noted = lambda step, task, kernel: (calls.append(len(task.params)), call(step, task, kernel))
    monkeypatch.setattr(Step, "call", noted)
    for t in range(3):
        for param in params[t % 2 :]:
            param.grad = random(100, seed=t)
        optimizer.step()
        optimizer.zero_grad()
    assert calls == [4, 3, 4]


def test_one_parameter_takes_torch_operations_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Bitwise as each by itself; the path and the log, once, say which and why."""
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float64)

    def make() -> list[Parameter]:
        return [Parameter(random(9, seed=i).to(dtype)) for i, dtype in enumerate(dtypes)]

    def step(optimizer: S3, params: list[Parameter]) -> None:
        for t in range(2):
            for param in params:
                param.grad = random(9, seed=10 + t).to(param.dtype)
            optimizer.step()

    params, others = make(), make()
    optimizer = S3(params)
    with caplog.at_level(logging.WARNING):
        step(optimizer, params)
    assert optimizer.path == (
        "C++ kernel; portable for 1 of 4 parameters, the first of 9 elements: the C++ kernel "
        "cannot take a param of torch.float64"
    )
    assert [r.message for r in caplog.records] == [
        f"S3 (SoftSignSGD) is updated by torch operations: {optimizer.path}"
    ]
    for param, other in zip(params, others, strict=True):
        step(S3([other]), [other])
        assert torch.equal(param, other)
    third = make()
    with pytest.raises(RuntimeError, match=r"fused=True, but .* param of torch.float64"):
        step(S3(third, fused=True), third)
    assert all(map(torch.equal, third, make()))


def test_devices_are_stepped_apart() -> None:
    """The CPU's kernel takes what lies there."""
    params = [Parameter(random(9, seed=0)), Parameter(torch.zeros(9, device="meta"))]
    params[0].grad, params[1].grad = random(9, seed=1), torch.zeros(9, device="meta")
    optimizer = S3(params)
    optimizer.step()
    assert optimizer.path.startswith("C++ kernel; portable for 1 of 2 parameters")
    assert "no kernel for S3 (SoftSignSGD) on meta" in optimizer.path


def test_a_gradient_that_a_collective_is_to_fill_is_waited_for() -> None:
    """The kernel takes what came."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    param, other = (Parameter(random(9, seed=0)) for _ in range(2))
    param.grad, other.grad = AsyncCollectiveTensor(random(9, seed=1)), random(9, seed=1)
    optimizer = S3([param])
    waited = []
    wait = AsyncCollectiveTensor.trigger_wait
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            AsyncCollectiveTensor,
            "trigger_wait",
            lambda self: (waited.append(self), wait(self))[1],
        )
        optimizer.step()
    S3([other]).step()
    assert torch.equal(param, other) and waited
    assert optimizer.path == "C++ kernel"


def test_copies_are_of_what_was_stepped_before() -> None:
    """Of parameters that overlap, and of which neither is dense."""
    results = []
    for together in (True, False):
        whole = torch.linspace(-1, 1, 12).view(3, 4).clone()
        params = [whole[:, :3], whole[:, 1:]]
        for param in params:
            param.grad = torch.ones(3, 3)
        for some in [params] if together else [[param] for param in params]:
            S3(some, lr=0.1).step()
        results.append(whole)
    assert torch.equal(*results)
