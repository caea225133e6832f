"""Two data-parallel ranks: Megatron's own DistributedOptimizer around S3, without the trainer."""

import argparse
import pathlib
import tempfile

import pytest
import torch

from tests.harness.reference import S3Reference
from tests.mcore import library
from tests.mcore.library import inner, on_ranks, states, step

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
AWARE = {"use_precision_aware_optimizer": True}
HALF = AWARE | {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
ALL = HALF | {"optimizer_offload_fraction": 1.0}


class Model(torch.nn.Module):
    """A matrix, a bias, and a parameter that is frozen.

    Args:
        fp32_bias: whether the bias stays in float32 where the model is cast.
    """

    def __init__(self, fp32_bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(40, 30)
        self.frozen = torch.nn.Parameter(torch.ones(7), requires_grad=False)
        self.fp32_bias = fp32_bias

    def bfloat16(self):
        super().bfloat16()
        if self.fp32_bias:
            self.linear.bias.data = self.linear.bias.data.float()
        return self


def build(dtype, sharded=True, fp32_bias=False, **settings):
    settings = {"weight_decay": 0.5} | settings
    return library.build(dtype=dtype, sharded=sharded, model=Model(fp32_bias), **settings)


def noted(owner, name):
    """Returns a list that grows whenever the owner's function is called."""
    function, calls = getattr(owner, name), []

    def note(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    setattr(owner, name, note)
    return calls


def norms():
    from megatron.core.optimizer import optimizer

    return noted(optimizer, "get_grad_norm_fp32")


def snapshot(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def params(optimizer):
    return [param for group in inner(optimizer).param_groups for param in group["params"]]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@on_ranks(2)
def test_steps_are_the_references(dtype):
    """Whole and sharded, bitwise alike: each element's update depends on it alone."""
    computed, results = norms(), []
    for sharded in (False, True):
        model, optimizer = build(dtype, sharded)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        reference = {n: S3Reference(p.detach(), weight_decay=0.5) for n, p in trained.items()}
        (frozen,) = (p for p in model.parameters() if not p.requires_grad)
        before = frozen.clone()
        for seed in range(5):
            success, norm, _ = step(model, optimizer, seed)
            assert success and norm == 0.0 and isinstance(norm, float)
            grads = {}
            for rank in range(2):  # what DDP averages
                torch.manual_seed(100 * seed + rank)
                for name, p in trained.items():
                    grads[name] = grads.get(name, 0) + torch.randn(p.shape).double() / 2
            for name in reference:
                reference[name].step(grads[name], 0.1)
        assert not computed, "the gradient norm was computed"
        # One rounding to the parameter's dtype, and fp32's few beside it.
        near = {"rtol": 2**-8 if dtype == BF16 else 1e-5, "atol": 1e-5, "check_dtype": False}
        for name, p in trained.items():
            torch.testing.assert_close(p.double(), reference[name].x, **near)
        assert torch.equal(frozen, before)
        results.append(snapshot(model))
    assert equal(*results)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("sharded", [False, True])
@on_ranks(2)
def test_the_state_is_two_fp32_tensors_and_sharded(dtype, sharded):
    from megatron_s3.mcore.distributed import ElementwiseDistributedOptimizer

    model, optimizer = build(dtype, sharded)
    step(model, optimizer)
    held = sum(t.numel() * t.element_size() for t in states(optimizer))
    mine = sum(p.numel() for p in params(optimizer))
    assert held == 8 * mine
    if sharded:
        assert isinstance(optimizer.chained_optimizers[0], ElementwiseDistributedOptimizer)
        counts = [None, None]
        torch.distributed.all_gather_object(counts, mine)
        whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(counts) == whole, "state is not sharded, or not whole"
        assert abs(counts[0] - counts[1]) <= 128 * 2
    groups = inner(optimizer).param_groups  # which hold nothing of Adam's
    assert all("betas" not in g and "eps" not in g for g in groups)
    assert {g["algorithm"] for g in groups} == {"s3"}


@pytest.mark.parametrize("settings", [{"clip_grad": 0.5}, {"plugin_log_grad_norm": True}], ids=str)
@on_ranks(2)
def test_the_norm_is_computed_where_it_is_asked_for(settings):
    computed = norms()
    success, norm, _ = step(*build(BF16, **settings))
    assert success and norm > 0 and len(computed) == 1


@pytest.mark.parametrize(("threshold", "taken"), [(1e-6, False), (1e6, True)])
@on_ranks(2)
def test_a_gradient_whose_norm_is_over_the_threshold_is_left_out(threshold, taken):
    """From 0.19 on."""
    model, optimizer = build(BF16, grad_norm_skip_threshold=threshold)
    before = snapshot(model)
    success, norm, _ = step(model, optimizer)
    assert success is taken and norm > 0
    assert equal(before, snapshot(model)) is not taken


@pytest.mark.parametrize("sharded", [False, True])
@on_ranks(2)
def test_an_overflow_on_one_rank_skips_the_step_on_both(sharded):
    """fp16: nothing changes but the scale."""
    model, optimizer = build(FP16, sharded, initial_loss_scale=1024.0, hysteresis=1)
    assert step(model, optimizer, 0, scale=1024.0)[0]
    watched = [*model.parameters(), *params(optimizer), *states(optimizer)]
    before = [t.detach().clone() for t in watched]
    infinite = torch.distributed.get_rank() == 1
    assert step(model, optimizer, 1, scale=float("inf") if infinite else 1024.0)[0] is False
    assert all(torch.equal(a, b) for a, b in zip(before, watched, strict=True))
    assert optimizer.get_loss_scale().item() == 512.0
    assert {g["step"] for g in inner(optimizer).param_groups} == {1}
    assert step(model, optimizer, 2, scale=512.0)[0]
    assert not any(
        torch.equal(a, b)
        for a, b in zip(before, watched, strict=True)
        if a.is_leaf and a.numel() > 7
    )


WAYS = {
    "whole": (False, {}),
    "sharded": (True, {}),
    "sharded, portable": (True, {"plugin_no_fused": True}),
    "aware": (True, AWARE),
    "aware, portable": (True, AWARE | {"plugin_no_fused": True}),
    "half offloaded": (True, HALF | {"overlap_cpu_optimizer_d2h_h2d": True}),
    "offloaded": (True, ALL),
}


def three_steps(way, fp32_bias):
    """Returns the model, the optimizer, and how often upstream copied main parameters."""
    from megatron.core.optimizer import optimizer as upstream
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    sharded, settings = WAYS[way]
    cls = DistributedOptimizer if sharded else upstream.Float16OptimizerWithFloat16Params
    entered = noted(cls, "_copy_main_params_to_model_params")
    model, optimizer = build(BF16, sharded, fp32_bias, **settings)
    for seed in range(3):
        assert step(model, optimizer, seed)[0]
    return model, optimizer, entered


@pytest.mark.parametrize("fp32_bias", [False, True])
@pytest.mark.parametrize("way", WAYS)
@on_ranks(2)
def test_a_step_is_one_pass(way, fp32_bias):
    """Upstream's copies are not entered, and the parameters are those of every other way."""
    model, optimizer, entered = three_steps(way, fp32_bias)
    portable = "portable" in way
    assert inner(optimizer).path == ("portable: fused=False" if portable else "C++ kernel")
    assert len(entered) == (3 if portable else 0)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == ({BF16, FP32} if fp32_bias else {BF16})
    assert equal(snapshot(three_steps("whole", fp32_bias)[0]), snapshot(model))


@pytest.mark.parametrize("fp32_bias", [False, True])
@pytest.mark.parametrize("way", ["whole", "sharded", "sharded, portable"])
@on_ranks(2)
def test_the_models_parameters_are_the_main_ones_rounded(way, fp32_bias):
    model, optimizer, entered = three_steps(way, fp32_bias)
    (part,) = optimizer.chained_optimizers
    if way == "whole":
        pairs = [
            pair
            for both in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
            for pair in zip(*both, strict=True)
        ]
    else:
        pairs = list(part.model_and_own_params())
    assert pairs
    for param, main in pairs:
        own = param.view(-1)
        if way != "whole":
            place = part._get_model_param_range_map(param)["param"]
            own = own[place.start : place.end]
        assert torch.equal(own, main.view(-1).to(param.dtype))
    entered.clear()
    for param in model.parameters():
        param.data.zero_()
    part._copy_main_params_to_model_params()  # by hand it does copy
    assert len(entered) == 1 and any(bool(p.any()) for p in model.parameters())


@pytest.mark.parametrize("fp32_bias", [False, True])
@pytest.mark.parametrize("way", ["aware", "half offloaded", "offloaded"])
@on_ranks(2)
def test_main_parameters_are_a_state_where_the_model_has_none_of_their_own(way, fp32_bias):
    _, optimizer, _ = three_steps(way, fp32_bias)
    offload = inner(optimizer).host.offload
    offloaded = offload.params if offload else {}
    assert bool(offloaded) == ("offloaded" in way)
    counts = [(len(offloaded), len(inner(optimizer).state)), None]
    torch.distributed.all_gather_object(counts, counts[0])
    some, whole = map(sum, zip(*counts, strict=True))
    assert some < whole or way == "offloaded"
    for param, state in inner(optimizer).state.items():
        assert ("master_param" in state) == (param.dtype == BF16 or param in offloaded)
        dtypes = {name: tensor.dtype for name, tensor in state.items()}
        main = torch.int16 if way == "aware" and param.dtype == BF16 else FP32
        assert dtypes.pop("master_param", main) == main
        assert set(dtypes.values()) == {FP32}


@pytest.mark.parametrize(
    ("dtype", "settings"), [(BF16, AWARE), (BF16, HALF), (FP32, ALL)], ids=["aware", "half", "all"]
)
@on_ranks(2)
def test_weights_that_are_loaded_later_reach_main_parameters(dtype, settings):
    model, optimizer = build(dtype, **settings)
    (part,) = optimizer.chained_optimizers
    part.optimizer.init_state()
    for param in model.parameters():
        param.data.fill_(3.0)
    optimizer.reload_model_params()
    masters = [tensors["param"] for tensors in held(part)]
    assert masters and all(bool((m == 3.0).all()) and m.dtype == FP32 for m in masters)
    assert part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


@pytest.mark.parametrize("remainders", [False, True])
@on_ranks(2)
def test_main_parameters_as_remainders_are_those_in_float32(remainders):
    """Bitwise, of Megatron's own float32 main parameters; and the model's are the nearest."""
    from megatron_s3.kernels.compact import split

    model, optimizer = build(BF16, **AWARE, store_param_remainders=remainders)
    plain, other = build(BF16)
    for seed in range(3):
        assert step(model, optimizer, seed)[0] and step(plain, other, seed)[0]
    ours, theirs = (held(each.chained_optimizers[0]) for each in (optimizer, other))
    assert ours and all(map(equal, ours, theirs))
    if not remainders:
        assert equal(snapshot(model), snapshot(plain))
    (part,) = optimizer.chained_optimizers
    for param, own in part.model_and_own_params():
        main = part._get_main_param_and_optimizer_states(param)["param"]
        nearest = split(main)[0] if remainders else main.bfloat16()
        assert torch.equal(own, nearest)


def held(part):
    return [part._get_main_param_and_optimizer_states(p) for p in part.model_param_gbuf_map]


@pytest.mark.parametrize("settings", [HALF, ALL], ids=["half", "all"])
@on_ranks(2)
def test_state_goes_from_one_memory_to_the_other_steps_included(settings):
    model, optimizer = build(BF16, **AWARE)
    (part,) = optimizer.chained_optimizers
    assert step(model, optimizer, 0)[0]
    _, other = build(BF16, **settings)
    (target,) = other.chained_optimizers
    other.load_state_dict(optimizer.state_dict())
    for param, tensors in zip(target.model_param_gbuf_map, held(part), strict=True):
        target._set_main_param_and_optimizer_states(param, tensors)
    for one, two in zip(held(part), held(target), strict=True):
        assert one.keys() == {"param", "exp_avg", "exp_pnorm"} and equal(one, two)
    assert {g["step"] for g in target.optimizer.param_groups} == {1}


@on_ranks(2)
def test_marks_in_a_state_are_no_tensors_of_it():
    """Megatron's own tests leave some."""
    model, optimizer = build(BF16, **AWARE)
    (part,) = optimizer.chained_optimizers
    assert step(model, optimizer, 0)[0]
    for state in part.optimizer.state.values():
        state["found_inf"] = False
    assert all(tensors.keys() == {"param", "exp_avg", "exp_pnorm"} for tensors in held(part))
    for param, tensors in zip(part.model_param_gbuf_map, held(part), strict=True):
        part._set_main_param_and_optimizer_states(param, tensors | {"found_inf": False})


@on_ranks(2)
def test_errors_of_a_save_stay():
    """What the plugin wants to know of a save is what the save itself was told."""
    from megatron.training import checkpointing, global_vars

    from megatron_s3.mcore.checkpoint import saving

    class Own(Exception):
        pass

    def refuse(iteration):
        raise Own

    assert global_vars._GLOBAL_ARGS is None
    checkpointing.get_args = lambda: argparse.Namespace(save=None, ckpt_format="torch_dist")
    with pytest.raises(Own):
        saving.save_checkpoint(refuse, 3)


@on_ranks(2)
def test_an_iteration_that_is_saved_anew_is_no_checkpoint_meanwhile():
    """Of a format that torch writes alone; one that is saved to another place stays."""
    from megatron.training import checkpointing

    from megatron_s3.mcore.checkpoint import saving

    with tempfile.TemporaryDirectory() as save:
        told = argparse.Namespace(save=save, ckpt_format="torch_dcp")
        checkpointing.get_args = lambda: told
        index = pathlib.Path(save, "iter_0000003", ".metadata")
        index.parent.mkdir()
        index.touch()
        for elsewhere in ("non_persistent_ckpt", "release"):
            saving.save_checkpoint(lambda iteration, **kw: None, 3, **{elsewhere: True})
        assert index.exists()
        told.ckpt_format = "torch_dist"  # whose writing is wrapped itself, and has not begun
        saving.save_checkpoint(lambda iteration: None, 3)
        assert index.exists()
        told.ckpt_format = "torch_dcp"
        saving.save_checkpoint(lambda iteration: None, 3)
        assert index.exists() is (torch.distributed.get_rank() != 0)


@on_ranks(2)
def test_the_step_follows_the_models_memory():
    model, optimizer = build(BF16)
    (part,) = optimizer.chained_optimizers
    assert step(model, optimizer, 0)[0]
    (bucket,) = (bucket for buffer in part.buffers for bucket in buffer.buckets)
    part.prepare_grads()
    first = part._found
    assert first
    part.prepare_grads()
    assert part._found is first
    bucket.param_data = bucket.param_data.clone()
    with pytest.raises(RuntimeError, match="is no longer in the buffer"):
        part.prepare_grads()
    for param, (start, end, _) in part.buffers[0].param_index_map.items():
        param.data = bucket.param_data[start:end].view(param.shape)
    part.prepare_grads()
    storages = {v.untyped_storage().data_ptr() for v in part._found.values()}
    assert storages == {bucket.param_data.untyped_storage().data_ptr()}


@pytest.mark.parametrize("name", ["fp8_param_gather", "fp4_param_gather"])
@on_ranks(2)
def test_what_a_step_cannot_write_is_left_to_upstream(name):
    model, optimizer = build(BF16)
    (part,) = optimizer.chained_optimizers
    assert step(model, optimizer, 0)[0] and part._found
    for on in (True, False):
        setattr(part.ddp_config, name, on)
        part._found_for = None
        part.prepare_grads()
        assert (part._found is None) is on


@on_ranks(2)
def test_the_rate_is_on_the_device_for_a_graph_and_a_number_in_what_is_saved():
    results = []
    for in_graph in (False, True):
        model, optimizer = build(BF16, optimizer_cuda_graph=in_graph)
        assert inner(optimizer).fused is (True if in_graph else None)
        for _ in range(2):
            for group in inner(optimizer).param_groups:
                if in_graph:
                    group["lr"].fill_(0.25)
                else:
                    group["lr"] = 0.25
            assert step(model, optimizer, 0)[0]
            saved = inner(optimizer).state_dict()
            assert {type(g["lr"]) for g in saved["param_groups"]} == {float}
            inner(optimizer).load_state_dict(saved)
        results.append(snapshot(model))
    torch.testing.assert_close(*results)


@on_ranks(1)
def test_a_rate_that_is_set_later_is_on_the_device_for_a_graph():
    _, optimizer = build(BF16, optimizer_cuda_graph=True, lr=None)
    assert {group["lr"].item() for group in inner(optimizer).param_groups} == {0.0}


@on_ranks(1)
def test_what_changes_by_step_is_not_recorded():
    with pytest.raises(ValueError, match="changes by the step what is recorded once"):
        build(BF16, optimizer_cuda_graph=True, s3_bias_correction=True)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@on_ranks(1)
def test_the_state_is_there_for_whoever_saves_before_an_update(dtype):
    """By torch's state dict, and by Megatron's function, where the optimizer is not sharded."""
    for ask in (
        lambda part: part.optimizer.state_dict(),
        lambda part: part.init_state_fn(part.optimizer, part.config),
    ):
        _, optimizer = build(dtype, sharded=False)
        (part,) = optimizer.chained_optimizers
        ask(part)
        held = list(part.optimizer.state.values())
        assert held and all(state.keys() == {"exp_avg", "exp_pnorm"} for state in held)


@on_ranks(2)
def test_hyperparameters_have_their_flags_names():
    _, optimizer = build(FP32, s3_p=2.0, s3_beta=0.5, s3_nesterov=False)
    (group, *_) = inner(optimizer).param_groups
    assert (group["p"], group["beta"], group["nesterov"]) == (2.0, 0.5, False)


@pytest.mark.parametrize("sharded", [False, True])
@on_ranks(2)
def test_no_rate_stands_in_for_one_that_is_set_later(sharded):
    model, optimizer = build(FP32, sharded, lr=None)
    (part,) = optimizer.chained_optimizers
    for group in part.optimizer.param_groups:
        assert group["lr"] is None and group.get("max_lr") is None
    assert part.config.lr is None
    with pytest.raises(ValueError, match="lr is None"):
        step(model, optimizer, 0)
    for group in part.optimizer.param_groups:
        group["lr"] = 0.25
    assert step(model, optimizer, 0)[0]
