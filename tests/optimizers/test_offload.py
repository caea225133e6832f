"""Parameters that the CPU updates for another device: the same bits, in other memory."""

import copy
from typing import Any

import pytest
import torch

from megatron_s3 import S3
from megatron_s3.kernels.statistics import LARGEST, Statistics
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer
from megatron_s3.optimizers.offload import Offload
from megatron_s3.optimizers.step import Step
from tests.harness.tensors import random

SIZES = ((40, 10), (300,), (7, 3), (1,), (200,))
DTYPES = [torch.float32, torch.bfloat16]


def built(
    cls: type[ElementwiseOptimizer] = S3,
    dtype: torch.dtype = torch.bfloat16,
    fraction: float | None = None,
    overlap: bool = False,
    **options: Any,
) -> ElementwiseOptimizer:
    params = [torch.nn.Parameter(random(*s, seed=i).to(dtype)) for i, s in enumerate(SIZES)]
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.0}]
    optimizer = cls(groups, lr=0.1, weight_decay=0.1, **options)
    optimizer.host.master_params = True
    if fraction is not None:
        optimizer.host.offload = Offload(params, fraction, overlap=overlap)
    return optimizer


def params(optimizer: ElementwiseOptimizer) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def stepped(optimizer: ElementwiseOptimizer, *seeds: int) -> ElementwiseOptimizer:
    for seed in seeds:
        for i, param in enumerate(params(optimizer)):
            param.grad = None
            param.decoupled_grad = random(*param.shape, seed=100 * seed + i)
        optimizer.step()
    return optimizer


def assert_same(one: ElementwiseOptimizer, other: ElementwiseOptimizer) -> None:
    for a, b in zip(params(one), params(other), strict=True):
        assert torch.equal(a, b)
        for name in one.description.state:
            assert torch.equal(one.state[a][name], other.state[b][name]), name
        masters = [o.state[p].get("master_param", p) for o, p in ((one, a), (other, b))]
        assert torch.equal(*masters)
    assert [g["step"] for g in one.param_groups] == [g["step"] for g in other.param_groups]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_the_same_bits(dtype: torch.dtype, overlap: bool, fraction: float) -> None:
    one = stepped(built(dtype=dtype, beta_ramp=True), 1, 2, 3)
    other = stepped(built(dtype=dtype, fraction=fraction, overlap=overlap, beta_ramp=True), 1, 2, 3)
    assert_same(one, other)
    assert other.path == "C++ kernel"
    mine = {id(p) for p in other.host.offload.params}
    for param in params(other):
        state = other.state[param]
        assert ("master_param" in state) == (id(param) in mine or dtype == torch.bfloat16)
        assert state.get("master_param") is not param
        assert all(t.device.type == "cpu" for t in state.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str) -> None:
    cls = OPTIMIZERS[name]
    assert_same(
        stepped(built(cls), 1, 2, 3), stepped(built(cls, fraction=0.5, overlap=True), 1, 2, 3)
    )


def test_the_fraction_is_of_elements() -> None:
    """Whole parameters from the first on, as Megatron's hybrid optimizer takes them."""
    sizes = [torch.Size(s).numel() for s in SIZES]
    for fraction, count in (
        (0.0, 0),
        (0.01, 1),
        (400 / sum(sizes), 1),
        (0.5, 2),
        (0.76, 3),
        (1, 5),
    ):
        assert len(built(fraction=fraction).host.offload.params) == count, fraction


def test_gradients_may_change_their_dtype_and_be_missing() -> None:
    one, other = built(), built(fraction=1.0)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        for optimizer in (one, other):
            first, *rest = params(optimizer)
            first.decoupled_grad = None
            for i, param in enumerate(rest):
                param.decoupled_grad = random(*param.shape, seed=i).to(dtype)
            optimizer.step()
    for a, b in zip(params(one), params(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before", [None, 0.5, 1.0])
@pytest.mark.parametrize("after", [None, 0.5, 1.0])
def test_state_goes_from_one_memory_to_the_other(
    dtype: torch.dtype, before: float | None, after: float | None
) -> None:
    """Saved with any fraction, loaded with any other or none."""
    unbroken = stepped(built(dtype=dtype), 1, 2, 3)
    saved = copy.deepcopy(stepped(built(dtype=dtype, fraction=before), 1, 2))
    resumed = built(dtype=dtype, fraction=after)
    for param, old in zip(params(resumed), params(saved), strict=True):
        param.data.copy_(old)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert_same(unbroken, stepped(resumed, 3))


def test_another_dtype_of_the_state_is_converted() -> None:
    wide = stepped(built(fraction=1.0), 1)
    narrow = built(fraction=1.0, state_dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="exp_avg from torch.float32 to torch.bfloat16"):
        narrow.load_state_dict(wide.state_dict())
    dtypes = {t.dtype for p in params(narrow) for n, t in narrow.state[p].items() if "exp" in n}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("fused", [None, False])
def test_statistics_are_of_all(fused: bool | None) -> None:
    totals = []
    for fraction in (None, 0.5, 1.0):
        optimizer = built(fraction=fraction, overlap=True, fused=fused)
        optimizer.host.statistics = Statistics("cpu", 2)
        optimizer.host.statistics.rows = dict.fromkeys(params(optimizer)[2:], 1)
        stepped(optimizer, 1, 2)
        totals.append(optimizer.host.statistics.values)
    for other in totals[1:]:
        assert torch.equal(totals[0][:, LARGEST], other[:, LARGEST])
        torch.testing.assert_close(totals[0], other, rtol=1e-12, atol=0)


class Device:
    """Stands for torch.cuda: notes in which order copies, waits and steps are asked for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.made = 0
        self.now = self.stream("main")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_stream", lambda: self.now)
        patch.setattr(torch.cuda, "Stream", self._new)
        patch.setattr(torch.cuda, "stream", self._on)
        empty, copy_ = torch.empty_like, torch.Tensor.copy_
        self.pinned = 0

        def empty_like(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            self.pinned += pin_memory
            return empty(*args, **kwargs)

        def noted(into: torch.Tensor, *args: Any, non_blocking: bool = False) -> torch.Tensor:
            if non_blocking:
                self.told.append(f"copy on {self.now.name}")
            return copy_(into, *args)

        patch.setattr(torch, "empty_like", empty_like)
        patch.setattr(torch.Tensor, "copy_", noted)

    def _new(self) -> Any:
        self.made += 1
        return self.stream(("down", "up")[self.made - 1])

    def stream(self, name: str) -> Any:
        device = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                if other is not self:
                    device.told.append(f"{name} waits for {other.name}")

            def record_event(self) -> Any:
                return self

            def synchronize(self) -> None:
                device.told.append("host waits")

        Stream.name = name
        return Stream()

    def _on(self, stream: Any) -> Any:
        device = self

        class Context:
            def __enter__(self) -> None:
                self.before, device.now = device.now, stream

            def __exit__(self, *_: object) -> None:
                device.now = self.before

        return Context()


@pytest.mark.parametrize("overlap", [False, True])
def test_the_order_of_copies_and_steps(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU it would be asked for; real streams are not there."""
    optimizer = built(fraction=0.5, overlap=overlap)
    device = Device(monkeypatch)
    call = Step.call

    def noted(self: Step, task: Any, kernel: Any) -> None:
        offloaded = task.offload is not None
        if offloaded:
            wait = task.offload.wait
            monkeypatch.setattr(
                task.offload,
                "wait",
                lambda params: (wait(params), device.told.append("step on the CPU")),
            )
        else:
            device.told.append("step on the GPU")
        call(self, task, kernel)
        if offloaded:
            monkeypatch.setattr(task.offload, "wait", wait)

    monkeypatch.setattr(Step, "call", noted)
    stepped(optimizer, 1)
    fetch = ["down waits for main", "copy on down"] if overlap else ["copy on main"]
    back = ["up waits for main", "copy on up", "main waits for up"] if overlap else ["copy on main"]
    one = ["host waits", "step on the CPU", *back]
    both = [*one, *one] if overlap else ["host waits", *one[:2], *back, *back]
    # Two parameters of the first group travel; the rest of it and the second group stay.
    assert device.told == [*fetch, *fetch, "step on the GPU", "step on the GPU", *both]
    assert device.pinned == 4, "gradients and new parameters, and no master"
    assert device.made == (2 if overlap else 0)
