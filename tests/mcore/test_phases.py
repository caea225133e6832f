"""The step in one pass against upstream's phases, on the library: the same bits and norms."""

import pytest
import torch

from tests.mcore.library import build, inner, on_ranks, step

SETTINGS = {
    "plain": {},
    "clipped": {"clip_grad": 0.5},
    "norm": {"plugin_log_grad_norm": True},
    "zeros": {"log_num_zeros_in_grad": True},
    "fp16": {"dtype": torch.float16, "loss_scale": 8.0},
    "fp16, clipped": {"dtype": torch.float16, "loss_scale": 8.0, "clip_grad": 0.5},
}


class InFp32(torch.nn.Linear):
    """Stays in fp32 in a model of another dtype."""

    def _apply(self, fn, recurse=True):
        return self


def mixed(sharded, **settings):
    """A model in two dtypes, with gradients in each parameter's, and its optimizer."""
    torch.manual_seed(0)
    return build(
        model=torch.nn.Sequential(torch.nn.Linear(40, 30), InFp32(30, 20)),
        sharded=sharded,
        ddp={"grad_reduce_in_fp32": False},
        **settings,
    )


def trained(sharded, **settings):
    """Two steps with gradients in the parameters' dtypes: parameters, states, what a step says."""
    model, optimizer = mixed(sharded, **settings)
    assert len({param.dtype for param in model.parameters()}) == 2
    before = [param.detach().clone() for param in model.parameters()]
    said = [step(model, optimizer, seed) for seed in range(2)]
    # What the step was given of Megatron's is let go of, and by hand its copies are made.
    assert not inner(optimizer).host.model_params
    after = [param.detach().clone() for param in model.parameters()]
    (part,) = optimizer.chained_optimizers
    for param in model.parameters():
        if param.dtype != torch.float32:
            param.data.zero_()
    part._copy_main_params_to_model_params()
    for param in model.parameters():
        if sharded and param.dtype != torch.float32:
            torch.distributed.all_reduce(param.data)  # of which each rank has written its own
    assert all(map(torch.equal, after, model.parameters()))
    optimizer.zero_grad()
    held = [param for group in inner(optimizer).param_groups for param in group["params"]]
    assert all(getattr(param, "decoupled_grad", None) is None for param in held)
    tensors = [param.detach() for param in model.parameters()]
    assert not any(map(torch.equal, before, tensors)), "a parameter was not stepped"
    states = inner(optimizer).state.values()
    return tensors + [tensor for state in states for tensor in state.values()], said


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("sharded", [False, True])
@on_ranks(2)
def test_parameters_kept_in_fp32_beside_others(sharded, case):
    one, said = trained(sharded, **SETTINGS[case])
    phases, theirs = trained(sharded, plugin_no_fused=True, **SETTINGS[case])
    assert said == theirs
    assert all(map(torch.equal, one, phases))


@on_ranks(1)
def test_gradients_in_fp32_that_were_given_up():
    model, optimizer = mixed(False)
    step(model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        if param.dtype == torch.float32:
            param.main_grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"gradients of shape .* have no memory now"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
