"""Tests the state of a sharded optimizer, and the count of steps that a CUDA graph replays."""

from types import SimpleNamespace

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


@on_ranks(2)
def test_groups_are_saved_without_what_one_rank_alone_knows():
    model, optimizer = build()
    step(model, optimizer)
    (part,) = optimizer.chained_optimizers
    groups = part.state_dict()["optimizer"]["param_groups"]
    assert groups and all("algorithm" in group and "params" not in group for group in groups)
    everyone = [None] * 2
    torch.distributed.all_gather_object(everyone, groups)
    assert everyone[0] == everyone[1]


@pytest.mark.parametrize("aware", [False, True])
@on_ranks(1)
def test_the_main_parameter_is_what_is_saved_and_loaded(aware):
    """In fp32, whoever holds it, with the states beside it; what is no tensor is left out."""
    settings = {"use_precision_aware_optimizer": aware, "store_param_remainders": False}
    model, optimizer = build(**settings)
    (part,) = optimizer.chained_optimizers
    for param in model.parameters():
        found = part._get_main_param_and_optimizer_states(param)  # made by asking for it
        assert found.keys() == {"param", "exp_avg", "exp_pnorm"}
        new = {name: torch.full_like(tensor, 1 + 2**-20) for name, tensor in found.items()}
        part._set_main_param_and_optimizer_states(param, new | {"exp_pnorm": None})
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        assert torch.equal(found["param"], new["param"]) and not found["exp_pnorm"].any()
    step(model, optimizer)
    held = inner(optimizer).state if aware else inner(optimizer).param_groups[0]["params"]
    mains = [state["master_param"] for state in held.values()] if aware else held
    saved = [part._get_main_param_and_optimizer_states(p)["param"] for p in model.parameters()]
    assert set(map(id, saved)) >= set(map(id, mains))


@on_ranks(1)
def test_what_is_stored_in_another_form_is_saved_and_loaded_as_values():
    """Main parameters in fp32 and exp_avg in bf16, whose tensors are copies."""
    small = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.bfloat16}
    model, optimizer = build(use_precision_aware_optimizer=True, **small)
    (part,) = optimizer.chained_optimizers
    for param in model.parameters():
        found = part._get_main_param_and_optimizer_states(param)
        assert [t.dtype for t in found.values()] == [torch.float32, *[torch.bfloat16] * 2]
        assert [part._get_state_key_dtype(name) for name in found if name != "param"] == [
            torch.bfloat16
        ] * 2
        given = {"param": 1 + 2**-20, "exp_avg": -0.5, "exp_pnorm": 1.0}
        new = {name: torch.full_like(tensor, given[name]) for name, tensor in found.items()}
        part._set_main_param_and_optimizer_states(param, new)
        again = part._get_main_param_and_optimizer_states(param)
        assert torch.equal(again["param"], new["param"])
        assert torch.equal(again["exp_pnorm"], new["exp_pnorm"])
        assert (again["exp_avg"] + 0.5).abs().max() < 0.5 / 127
        new["exp_avg"].fill_(2.0)
        with pytest.raises(
            ValueError, match=r"exp_avg of a parameter of shape .* exceeds exp_pnorm"
        ):
            part._set_main_param_and_optimizer_states(param, new)


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
    with pytest.raises(RuntimeError, match=r"number of updates differs.*Give every parameter a"):
        part.state_dict()


@on_ranks(1)
def test_states_are_loaded_in_the_precision_they_are_held_in():
    settings = {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}
    model, optimizer = build(**settings, store_param_remainders=False)
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


def of_two_parts(name="s3", **settings):
    """A model with experts, whose optimizer is a part of its own; each part has two groups."""
    from megatron.core.optimizer import ParamKey

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(20, 20) for _ in range(2)))
    for param in model[1].parameters():
        param.allreduce = False
    overrides = {ParamKey(name="*.bias"): {"weight_decay": 0.7}}
    return build(name, overrides, model=model, **settings)


def parts(optimizer):
    """The optimizers in a Megatron optimizer."""
    return [part.optimizer for part in optimizer.chained_optimizers]


def counted(groups):
    return {group["step"] for group in groups if group["params"]}


@on_ranks(1)
def test_parts_that_are_brought_to_one_number_go_on_with_their_own():
    """The first part is updated once more than the second; NAdam's update takes the count."""
    results = []
    for together in (False, True):
        model, optimizer = of_two_parts("nadam")
        step(model, optimizer)
        first, second = parts(optimizer)
        for group in first.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        first.step()
        if together:
            assert optimizer._synchronize_steps() == 2
        groups = [*first.param_groups, *second.param_groups]
        assert counted(groups) == ({2} if together else {1, 2})
        for param in (param for group in second.param_groups for param in group["params"]):
            assert second.counts.of(param, second.param_groups[0]) == 1
        step(model, optimizer, 1)
        results.append([param.detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *results))


class Graph:
    """Stands in for a CUDA graph, which the CPU cannot capture: its replay runs no Python."""

    def replay(self) -> None:
        pass


@on_ranks(1)
def test_replayed_steps_are_counted_unless_they_were_skipped():
    from megatron.core.optimizer.optimizer_cuda_graph import OptimizerCudaGraphWrapper as Wrapper

    model, optimizer = of_two_parts()
    step(model, optimizer)
    groups = [group for part in parts(optimizer) for group in part.param_groups]
    assert [len(part.param_groups) for part in parts(optimizer)] == [2, 2]
    wrapper = Wrapper(optimizer.step, cuda_graph_warmup_steps=10)
    assert counted(groups) == {1}
    model.zero_grad_buffer()
    assert wrapper()[0]
    assert counted(groups) == {2}  # run, and counted once
    Wrapper.cuda_graph = Graph()
    optimizer.chained_optimizers.append(SimpleNamespace(optimizer=None))  # of no parameters
    assert wrapper()[0]
    assert counted(groups) == {3}
    Wrapper.result = (False, None, None)
    assert not wrapper()[0]
    assert counted(groups) == {3}
