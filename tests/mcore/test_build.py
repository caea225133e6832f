"""The settings that the adapter passes to a built optimizer, each tested alone."""

import copy

import pytest
import torch

from tests.mcore.library import build, inner, on_ranks, step

AWARE = {"use_precision_aware_optimizer": True}
OFFLOADED = AWARE | {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}


@on_ranks(1)
def test_the_flags_decide_about_hyperparameters_and_the_checkpoint_about_rates():
    model, optimizer = build(s3_beta=0.5)
    step(model, optimizer)
    _, other = build(s3_beta=0.75)
    saved = copy.deepcopy(inner(optimizer).state_dict())
    inner(other).load_state_dict(
        saved | {"param_groups": [g | {"lr": 7.0} for g in saved["param_groups"]]}
    )
    assert {(g["beta"], g["lr"], g["step"]) for g in inner(other).param_groups} == {(0.75, 7.0, 1)}


@pytest.mark.parametrize("aware", [False, True])
@on_ranks(1)
def test_states_have_the_dtype_that_is_asked_for(aware):
    settings = AWARE | {"exp_avg_dtype": torch.bfloat16} if aware else {}
    model, optimizer = build(**settings)
    step(model, optimizer)
    assert inner(optimizer).host.master_params is aware
    for state in inner(optimizer).state.values():
        assert state["exp_avg"].dtype == (torch.bfloat16 if aware else torch.float32)
        assert state["exp_pnorm"].dtype == torch.float32 and ("master_param" in state) is aware


@on_ranks(1)
def test_parts_do_not_log_their_path_by_themselves():
    """Each rank would; the first one says it for all."""
    assert inner(build()[1]).host.log_path is False


@pytest.mark.parametrize("name", ["overlap", "pin_grads", "pin_params", None])
@on_ranks(1)
def test_an_offload_is_as_the_flags_say(name):
    flags = {
        "overlap": "overlap_cpu_optimizer_d2h_h2d",
        "pin_grads": "pin_cpu_grads",
        "pin_params": "pin_cpu_params",
    }
    settings = {flag: each == name for each, flag in flags.items()}
    offload = inner(build(**OFFLOADED, **settings)[1]).host.offload
    assert {each: getattr(offload, each) for each in flags} == {
        each: each == name for each in flags
    }
    held = sum(param.numel() for param in offload.params)
    assert 0.5 * 1850 <= held < 1850


@pytest.mark.parametrize("sharded", [True, False])
@on_ranks(1)
def test_the_state_is_in_what_is_saved_before_a_step(sharded):
    _, optimizer = build(sharded=sharded)
    saved = inner(optimizer).state_dict()
    assert [set(state) for state in saved["state"].values()] == [{"exp_avg", "exp_pnorm"}] * 4
    (part,) = build(sharded=sharded)[1].chained_optimizers
    part.init_state_fn(part.optimizer, part.config)  # by which Megatron makes it before loading
    assert [set(state) for state in part.optimizer.state.values()] == [{"exp_avg", "exp_pnorm"}] * 4


@on_ranks(1)
def test_a_graph_reads_one_tensor_of_each_group_from_the_first_step_on():
    _, optimizer = build(optimizer_cuda_graph=True)
    for _ in range(2):
        rates = [group["lr"] for group in inner(optimizer).param_groups]
        assert all(isinstance(lr, torch.Tensor) and lr.item() == pytest.approx(0.1) for lr in rates)
        inner(optimizer).load_state_dict(inner(optimizer).state_dict())
