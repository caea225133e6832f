"""Two data-parallel ranks: S3 on Megatron's torch FSDP2 wrapper, without the trainer."""

import copy
from argparse import Namespace

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.mcore.library import equal, globally, inner, on_ranks

DTYPES = [torch.float32, torch.bfloat16]


class Model(torch.nn.Module):
    """Sizes that two ranks share evenly and unevenly."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(40, 31)
        self.even = torch.nn.Parameter(torch.ones(8, 3))


def made(dtype, sharded=True, **settings):
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        TorchFullyShardedDataParallel,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    torch.manual_seed(0)
    bf16 = dtype == torch.bfloat16
    config = TransformerConfig(num_layers=1, hidden_size=40, num_attention_heads=1, bf16=bf16)
    model = Float16Module(config, Model()) if bf16 else Model()
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
    wrapper = TorchFullyShardedDataParallel if sharded else DistributedDataParallel
    model = wrapper(config, ddp, model)
    optimizer_config = OptimizerConfig(
        optimizer="s3", lr=0.1, weight_decay=0.5, bf16=bf16, params_dtype=dtype, clip_grad=0.0
    )
    for name, value in {"s3_beta_ramp": True, **settings}.items():
        setattr(optimizer_config, name, value)
    return model, get_megatron_optimizer(optimizer_config, [model])


def step(model, optimizer, seed):
    """With the same gradients whole and sharded, on both ranks; returns their norm."""
    torch.manual_seed(seed)
    for param in model.parameters():
        grad = torch.randn(param.shape).to(param.dtype)
        if isinstance(param, DTensor):
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
        else:
            param.main_grad.copy_(grad)
    success, norm, _ = optimizer.step()
    assert success
    return norm


def tensors(model, optimizer):
    """The model's, the main parameters and every state, whole."""
    found = [p.detach() for p in model.parameters()]
    for group in inner(optimizer).param_groups:
        for param in group["params"]:
            state = inner(optimizer).state[param]
            found += [param.detach(), state["exp_avg"], state["exp_pnorm"]]
    return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"plugin_no_fused": True}, {"clip_grad": 0.5}], ids=str)
@on_ranks(2)
def test_sharded_equals_whole(dtype, settings):
    """Bitwise where nothing is clipped, and in one pass."""
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as Upstream

    copies, function = [], Upstream._copy_main_params_to_model_params

    def note(self):
        copies.append(self)
        return function(self)

    Upstream._copy_main_params_to_model_params = note
    fused = "plugin_no_fused" not in settings
    results, norms = [], []
    for sharded in (False, True):
        copies.clear()
        model, optimizer = made(dtype, sharded, **settings)
        norms.append([step(model, optimizer, seed) for seed in range(3)])
        results.append(tensors(model, optimizer))
        assert inner(optimizer).path == ("C++ kernel" if fused else "portable: fused=False")
        assert len(copies) == (0 if fused or dtype == torch.float32 else 3), "not in one pass"
    if "clip_grad" in settings:
        torch.testing.assert_close(torch.tensor(norms[0]), torch.tensor(norms[1]))
        torch.testing.assert_close(*results)
    else:
        torch.testing.assert_close(torch.tensor(norms[0]), torch.tensor(norms[1]))
        assert equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_ranks(2)
def test_a_state_that_is_loaded_goes_on(dtype):
    """What --ckpt-format torch_dcp does: the template holds every state, and is loaded in place."""
    model, optimizer = made(dtype)
    for seed in range(3):
        step(model, optimizer, seed)
    fresh, other = made(dtype)
    template = other.state_dict(is_loading=True)
    states = template.get("optimizer", template)["state"].values()
    assert states and all(set(state) == {"exp_avg", "exp_pnorm"} for state in states)
    with torch.no_grad():
        for mine, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {group["step"] for group in inner(other).param_groups} == {3}
    assert equal(tensors(model, optimizer), tensors(fresh, other))
    step(model, optimizer, 3)
    step(fresh, other, 3)
    assert equal(tensors(model, optimizer), tensors(fresh, other))


@on_ranks(2)
def test_steps_are_restored_where_the_tensors_alone_are_loaded():
    """As with --ckpt-format torch_dist."""
    from megatron_s3.mcore import torch_fsdp2

    model, optimizer = made(torch.float32)
    for seed in range(3):
        step(model, optimizer, seed)
    _, other = made(torch.float32)
    torch_fsdp2.restore_step({"optimizer": optimizer.state_dict()})
    assert {group["step"] for group in inner(other).param_groups} == {3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_ranks(2)
def test_what_a_param_group_holds_is_restored_with_its_steps(dtype):
    """In a model of either precision, of as many groups as there were or of others."""
    from megatron_s3.mcore import torch_fsdp2

    torch_fsdp2.restore_step({"optimizer": {}})  # as no optimizer was built, nothing is read
    model, optimizer = made(dtype)
    step(model, optimizer, 0)
    (part,) = optimizer.chained_optimizers
    saved = copy.deepcopy(part.state_dict())
    groups = saved.get("optimizer", saved)["param_groups"]
    for group in groups:
        group |= {"step": 7, "steps": [5] * len(group["params"]), "max_lr": 9.0}
    _, other = made(dtype)
    other.chained_optimizers.append(Namespace(optimizer=None))  # of no parameter of this rank
    mine = other.chained_optimizers[0].optimizer

    def counted() -> set:
        return {(g["step"], mine.counts.of(p, g)) for g in mine.param_groups for p in g["params"]}

    torch_fsdp2.restore_step({})
    assert counted() == {(0, 0)}
    with globally(Namespace(use_checkpoint_opt_param_scheduler=True)):
        torch_fsdp2.restore_step({"optimizer": saved})
    assert counted() <= {(7, 5), (7, 7)} and (7, 5) in counted()  # others hold the elements
    assert {(g["step"], g["max_lr"]) for g in mine.param_groups} == {(7, 9.0)}
    groups.append(groups[0] | {"step": 8})
    torch_fsdp2.restore_step({"optimizer": saved})
    assert counted() == {(8, 8)}  # which is which is not known


@on_ranks(2)
def test_parameters_are_numbered_by_their_local_tensors():
    from megatron_s3.mcore.torch_fsdp2 import optim_param_to_id_map

    model, _ = made(torch.float32)
    params = [*model.parameters(), torch.nn.Parameter(torch.ones(2))]
    found = optim_param_to_id_map(list, params)
    right = [p._local_tensor if isinstance(p, DTensor) else p for p in params]
    assert all(one is other for one, other in zip(found, right, strict=True))
    assert found[0] is not params[0] and found[-1] is params[-1]
