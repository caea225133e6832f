"""Tests the state of a sharded optimizer, and the count of steps that a CUDA graph replays."""

import pytest
import torch

from tests.mcore.library import build, inner, on_ranks, step


@on_ranks(2)
def test_the_loss_scale_is_saved_and_taken_over():
    model, optimizer = build(dtype=torch.float16, initial_loss_scale=8.0)
    step(model, optimizer)
    (part,) = optimizer.chained_optimizers
    saved = part.state_dict()
    assert saved["grad_scaler"]["scale"].item() == 8.0
    _, other = build(dtype=torch.float16, initial_loss_scale=4.0)
    (other,) = other.chained_optimizers
    assert other.get_loss_scale().item() == 4.0
    other.load_state_dict(saved)
    assert other.get_loss_scale().item() == 8.0


@on_ranks(1)
def test_steps_that_differ_between_parameters_are_not_saved_as_one():
    model, optimizer = build("nadam")  # whose update takes the count
    step(model, optimizer)
    (part,) = optimizer.chained_optimizers
    part.state_dict()
    torch_optimizer = inner(optimizer)
    params = max((group["params"] for group in torch_optimizer.param_groups), key=len)
    assert len(params) > 1
    for param in params:
        param.grad = torch.ones_like(param)
    params[0].grad = None
    torch_optimizer.step()
    with pytest.raises(RuntimeError, match=r"another number of updates.*Give every parameter a"):
        part.state_dict()


@on_ranks(1)
def test_states_are_loaded_in_the_precision_they_are_held_in():
    settings = {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}
    model, optimizer = build(**settings)
    step(model, optimizer)
    (part,) = optimizer.chained_optimizers
    held = {
        key: value.dtype
        for state in inner(optimizer).state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    assert held["exp_avg"] == torch.bfloat16
    assert {key: part._get_state_key_dtype(key) for key in held} == held


class Graph:
    """Stands in for a CUDA graph, which the CPU cannot capture: its replay runs no Python."""

    def replay(self) -> None:
        pass


@on_ranks(1)
def test_replayed_steps_are_counted_unless_they_were_skipped():
    from megatron.core.optimizer.optimizer_cuda_graph import OptimizerCudaGraphWrapper as Wrapper

    model, optimizer = build()
    step(model, optimizer)
    group = inner(optimizer).param_groups[0]
    wrapper = Wrapper(optimizer.step, cuda_graph_warmup_steps=10)
    assert group["step"] == 1
    model.zero_grad_buffer()
    assert wrapper()[0]
    assert group["step"] == 2  # run, and counted once
    Wrapper.cuda_graph = Graph()
    assert wrapper()[0]
    assert group["step"] == 3
    Wrapper.result = (False, None, None)
    assert not wrapper()[0]
    assert group["step"] == 3
