"""S3's step on a GPU: what only a real device can show."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron_s3 import S3
from megatron_s3.kernels import gpu
from scripts.acceptance.graphs import replayed_and_eager

SIZES = (1, 130, 16_384, 70_001)


def parameters(seed: int = 0, device: str = "cuda") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in SIZES]


def gradients(seed: int, device: str = "cuda") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(device) for n in SIZES]


@contextmanager
def no_host_waits() -> Iterator[None]:
    """Inside, torch raises where an operation would make the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_kernel_runs() -> None:
    (param, *_) = parameters()
    param.grad = torch.ones_like(param)
    optimizer = S3([param], fused=True)
    optimizer.step()
    assert optimizer.path == "Triton kernel"


@pytest.mark.parametrize("rate_on_device", [False, True])
def test_the_host_never_waits_for_a_step(rate_on_device: bool) -> None:
    """From the second on: the first makes tables."""
    params = parameters()
    lr = torch.tensor(0.01, device="cuda") if rate_on_device else 0.01
    optimizer = S3(params, lr=lr, weight_decay=0.1, fused=True)
    for number in range(3):
        for param, grad in zip(params, gradients(number), strict=True):
            if param.grad is None:
                param.grad = grad
            else:
                param.grad.copy_(grad)
        torch.cuda.synchronize()
        if number:
            with no_host_waits():
                optimizer.step()
        else:
            optimizer.step()


def test_gradients_that_move_every_step() -> None:
    """As under zero_grad(set_to_none=True): bitwise the portable step, and still no host waits."""
    ours, theirs = parameters(), parameters()
    one, two = S3(ours, lr=0.01, fused=True), S3(theirs, lr=0.01, fused=False)
    kept = []
    for number in range(4):
        for mine, other, grad in zip(ours, theirs, gradients(number), strict=True):
            mine.grad, other.grad = grad, grad.clone()
            kept.append(grad)  # so that the next lies elsewhere
        if number:
            with no_host_waits():
                one.step()
        else:
            one.step()
        two.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_the_same_bits_as_on_the_cpu() -> None:
    results = []
    for device in ("cuda", "cpu"):
        params = parameters(device=device)
        optimizer = S3(params, lr=0.01, weight_decay=0.1)
        for number in range(3):
            for param, grad in zip(params, gradients(number, device), strict=True):
                param.grad = grad
            optimizer.step()
        results.append([param.detach().cpu() for param in params])
    for on_gpu, on_cpu in zip(*results, strict=True):
        assert torch.equal(on_gpu, on_cpu)


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(("state", "grad"), [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)])
def test_replays_of_a_graph_are_eager_steps(state: torch.dtype, grad: torch.dtype) -> None:
    """Bitwise, with gradients and the learning rate changed in place between them."""
    for replayed, eager in zip(*replayed_and_eager(state, grad), strict=True):
        assert torch.equal(replayed, eager)


def test_capturing_before_any_step_is_an_error_and_changes_nothing() -> None:
    params = parameters()
    before = [param.detach().clone() for param in params]
    for param, grad in zip(params, gradients(1), strict=True):
        param.grad = grad
    optimizer = S3(params, lr=0.01, fused=True)
    optimizer.init_state()
    gpu._tables.clear()
    with pytest.raises(RuntimeError, match="take a step before"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
    torch.cuda.synchronize()
    for param, was in zip(params, before, strict=True):
        assert torch.equal(param, was)


def test_a_captured_step_outlives_the_caches_of_tables() -> None:
    """A replay reads tables that 300 other lists of tensors have pushed out of the caches."""
    params = parameters()
    lr = torch.tensor(0.01, device="cuda")
    optimizer = S3(params, lr=lr, fused=True)
    for param, grad in zip(params, gradients(1), strict=True):
        param.grad = grad
    optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for number in range(300):
        other = torch.nn.Parameter(torch.ones(number + 1, device="cuda"))
        other.grad = torch.ones_like(other)
        S3([other], lr=0.01, fused=True).step()
    torch.cuda.empty_cache()
    filling = [torch.full((64,), -1, device="cuda") for _ in range(1000)]
    twin = [torch.nn.Parameter(param.detach().clone()) for param in params]
    eager = S3(twin, lr=0.01, fused=False)
    for param, same in zip(params, twin, strict=True):
        eager.state[same] = {name: t.clone() for name, t in optimizer.state[param].items()}
        same.grad = param.grad.clone()
    graph.replay()
    eager.step()
    for param, same in zip(params, twin, strict=True):
        assert torch.equal(param, same)
    del filling


def test_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for device in ("cuda:1", "cpu"):
        params = parameters(device=device)
        optimizer = S3(params, lr=0.01)
        for param, grad in zip(params, gradients(1, device), strict=True):
            param.grad = grad
        optimizer.step()
        results.append([param.detach().cpu() for param in params])
    assert torch.cuda.current_device() == 0
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
