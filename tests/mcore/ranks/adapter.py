"""Two data-parallel ranks: Megatron's own DistributedOptimizer around S3, without the trainer."""

import argparse
import pathlib
import tempfile

import pytest
import torch
import torch.distributed

import megatron_s3

megatron_s3.register()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer import optimizer as upstream  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.training import checkpointing, global_vars  # noqa: E402

from megatron_s3.mcore.checkpoint import saving  # noqa: E402
from megatron_s3.mcore.distributed import ElementwiseDistributedOptimizer  # noqa: E402
from tests.harness.reference import S3Reference  # noqa: E402

torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
RANK = torch.distributed.get_rank()
NORMS = 0
entered = []


def counted(function):
    def count(*args, **kwargs):
        global NORMS
        NORMS += 1
        return function(*args, **kwargs)

    return count


upstream.get_grad_norm_fp32 = counted(upstream.get_grad_norm_fp32)


def noted(function):
    def note(self):
        entered.append(self)
        return function(self)

    return note


class Model(torch.nn.Module):
    """A matrix, a bias, and a parameter that is frozen."""

    keeps_bias_in_fp32 = False

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(40, 30)
        self.frozen = torch.nn.Parameter(torch.ones(7), requires_grad=False)

    def forward(self, x):
        return self.linear(x)


def build(dtype: torch.dtype, sharded: bool, **settings):
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=40,
        num_attention_heads=1,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )
    model = Model()
    if dtype != torch.float32:
        model = Float16Module(config, model)
        if Model.keeps_bias_in_fp32:
            model.module.linear.bias.data = model.module.linear.bias.data.float()
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=sharded, grad_reduce_in_fp32=True, overlap_grad_reduce=False
    )
    model = DistributedDataParallel(config, ddp, model)
    optimizer_config = OptimizerConfig(
        optimizer="s3",
        lr=0.1,
        weight_decay=0.5,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=sharded,
        clip_grad=0.0,
    )
    for name, value in settings.items():
        setattr(optimizer_config, name, value)
    return model, get_megatron_optimizer(optimizer_config, [model])


def step(model, optimizer, seed: int, scale: float = 1.0):
    model.zero_grad_buffer()
    torch.manual_seed(100 * seed + RANK)
    for param in model.parameters():
        if param.requires_grad:
            param.main_grad.copy_(torch.randn(param.shape) * scale)
    model.finish_grad_sync()
    return optimizer.step()


for dtype in (torch.float32, torch.bfloat16):
    results = []
    for sharded in (False, True):
        model, optimizer = build(dtype, sharded)
        reference = {
            name: S3Reference(p.detach(), weight_decay=0.5)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        frozen = next(p for n, p in model.named_parameters() if "frozen" in n).clone()
        NORMS = 0
        for seed in range(5):
            success, norm, _ = step(model, optimizer, seed)
            assert success and norm == 0.0 and isinstance(norm, float)
            grads = {}
            for rank in range(2):  # what DDP averages
                torch.manual_seed(100 * seed + rank)
                for name, p in model.named_parameters():
                    if p.requires_grad:
                        grads[name] = grads.get(name, 0) + torch.randn(p.shape).double() / 2
            for name in reference:
                reference[name].step(grads[name], 0.1)
        assert NORMS == 0, "the gradient norm was computed"
        # One rounding to the parameter's dtype, and fp32's few beside it.
        tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(
                    p.double(), reference[name].x, rtol=tolerance, atol=1e-5, check_dtype=False
                )
            else:
                assert torch.equal(p, frozen)
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
        inner = optimizer.chained_optimizers[0].optimizer
        params = [p for g in inner.param_groups for p in g["params"]]
        held = sum(t.numel() * t.element_size() for s in inner.state.values() for t in s.values())
        assert held == 8 * sum(p.numel() for p in params)
        whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if sharded:
            assert isinstance(optimizer.chained_optimizers[0], ElementwiseDistributedOptimizer)
            counts = [None, None]
            torch.distributed.all_gather_object(counts, sum(p.numel() for p in params))
            assert sum(counts) == whole, "state is not sharded, or not whole"
            assert abs(counts[0] - counts[1]) <= 128 * 2
        # The groups hold nothing of Adam's.
        assert all("betas" not in g and "eps" not in g for g in inner.param_groups)
        assert {g["algorithm"] for g in inner.param_groups} == {"s3"}
    # Bitwise: each element's update depends on it alone.
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])

for settings in ({"clip_grad": 0.5}, {"s3_log_grad_norm": True}):
    NORMS = 0
    model, optimizer = build(torch.bfloat16, True, **settings)
    success, norm, _ = step(model, optimizer, 0)
    assert success and norm > 0 and NORMS == 1, settings

# A gradient whose norm is over Megatron's threshold is left out (from 0.19 on).
if hasattr(OptimizerConfig, "grad_norm_skip_threshold"):
    for threshold, taken in ((1e-6, False), (1e6, True)):
        model, optimizer = build(torch.bfloat16, True, grad_norm_skip_threshold=threshold)
        before = [p.detach().clone() for p in model.parameters()]
        success, norm, _ = step(model, optimizer, 0)
        assert success is taken and norm > 0
        pairs = zip(before, model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is not taken

# fp16: an overflow on one rank alone skips the step on both, and changes nothing but the scale.
for sharded in (False, True):
    model, optimizer = build(torch.float16, sharded, initial_loss_scale=1024.0, hysteresis=1)
    assert step(model, optimizer, 0, scale=1024.0)[0]
    inner = optimizer.chained_optimizers[0].optimizer
    state = [t for s in inner.state.values() for t in s.values()]
    params = [p for g in inner.param_groups for p in g["params"]]
    watched = [*model.parameters(), *params, *state]
    before = [t.detach().clone() for t in watched]
    assert step(model, optimizer, 1, scale=float("inf") if RANK else 1024.0)[0] is False
    assert all(torch.equal(a, b) for a, b in zip(before, watched, strict=True))
    assert optimizer.get_loss_scale().item() == 512.0
    assert {g["step"] for g in inner.param_groups} == {1}
    assert step(model, optimizer, 2, scale=512.0)[0]
    assert not any(
        torch.equal(a, b)
        for a, b in zip(before, watched, strict=True)
        if a.is_leaf and a.numel() > 7
    )

# One pass: upstream's copies are not entered, and the model's parameters are the main ones rounded.
for cls in (DistributedOptimizer, upstream.Float16OptimizerWithFloat16Params):
    name = "_copy_main_params_to_model_params"
    setattr(cls, name, noted(getattr(cls, name)))
AWARE = {"use_precision_aware_optimizer": True}
HALF = AWARE | {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
for fp32_bias in (False, True):
    Model.keeps_bias_in_fp32 = fp32_bias
    results = []
    for sharded, settings in (
        (False, {}),
        (True, {}),
        (True, {"s3_no_fused": True}),
        (True, AWARE),
        (True, AWARE | {"s3_no_fused": True}),
        (True, HALF | {"overlap_cpu_optimizer_d2h_h2d": True}),
        (True, HALF | {"optimizer_offload_fraction": 1.0}),
    ):
        model, optimizer = build(torch.bfloat16, sharded, **settings)
        (part,) = optimizer.chained_optimizers
        entered.clear()
        for seed in range(3):
            assert step(model, optimizer, seed)[0]
        portable = "s3_no_fused" in settings
        assert part.optimizer.path == ("portable: fused=False" if portable else "C++ kernel")
        assert len(entered) == (3 if portable else 0), (settings, len(entered))
        params = dict(model.named_parameters())
        assert {p.dtype for p in params.values() if p.requires_grad} == {
            torch.bfloat16,
            torch.float32 if fp32_bias else torch.bfloat16,
        }
        results.append({n: p.detach().clone() for n, p in params.items()})
        if settings.get("use_precision_aware_optimizer"):
            offload = part.optimizer.offload
            offloaded = offload.params if offload else {}
            assert bool(offloaded) == ("optimizer_cpu_offload" in settings)
            for param, state in part.optimizer.state.items():
                has_master = param.dtype == torch.bfloat16 or param in offloaded
                assert ("master_param" in state) == has_master
                assert {t.dtype for t in state.values()} == {torch.float32}
            continue
        pairs = (
            list(part._model_and_own_params())
            if sharded
            else [
                (p, m)
                for ps, ms in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
                for p, m in zip(ps, ms, strict=True)
            ]
        )
        for p, main in pairs:
            own = p.view(-1)
            if sharded:
                place = part._get_model_param_range_map(p)["param"]
                own = own[place.start : place.end]
            assert torch.equal(own, main.view(-1).to(p.dtype))
        if not settings:
            for p in params.values():
                p.data.zero_()
            part._copy_main_params_to_model_params()  # by hand it does copy
            assert len(entered) == 1
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])
Model.keeps_bias_in_fp32 = False

# Weights that are loaded later reach main parameters that are there already.
ALL = HALF | {"optimizer_offload_fraction": 1.0}
for dtype, settings in (
    (torch.bfloat16, AWARE),
    (torch.bfloat16, HALF),
    (torch.float32, ALL),
):
    model, optimizer = build(dtype, True, **settings)
    (part,) = optimizer.chained_optimizers
    part.optimizer.init_state()
    for param in model.parameters():
        param.data.fill_(3.0)
    optimizer.reload_model_params()
    masters = [state["master_param"] for state in part.optimizer.state.values()]
    assert masters and all(bool((m == 3.0).all()) and m.dtype == torch.float32 for m in masters)
    assert part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


def held(part):
    return [part._get_main_param_and_optimizer_states(p) for p in part.model_param_gbuf_map]


# State goes from one memory to the other, steps included.
model, optimizer = build(torch.bfloat16, True, **AWARE)
(part,) = optimizer.chained_optimizers
assert step(model, optimizer, 0)[0]
for settings in (HALF, ALL):
    _, other = build(torch.bfloat16, True, **settings)
    (target,) = other.chained_optimizers
    other.load_state_dict(optimizer.state_dict())
    for param, tensors in zip(target.model_param_gbuf_map, held(part), strict=True):
        target._set_main_param_and_optimizer_states(param, tensors)
    for one, two in zip(held(part), held(target), strict=True):
        assert one.keys() == two.keys() == {"param", "exp_avg", "exp_pnorm"}
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert {g["step"] for g in target.optimizer.param_groups} == {1}
for state in part.optimizer.state.values():  # Megatron's own tests leave such marks
    state["found_inf"] = False
assert all(tensors.keys() == {"param", "exp_avg", "exp_pnorm"} for tensors in held(part))
for param, tensors in zip(part.model_param_gbuf_map, held(part), strict=True):
    part._set_main_param_and_optimizer_states(param, tensors | {"found_inf": False})


# What the plugin wants to know of a save is what the save itself was told; its errors stay.
class Own(Exception):
    pass


def refuse(iteration):
    raise Own


assert global_vars._GLOBAL_ARGS is None
checkpointing.get_args = lambda: argparse.Namespace(save=None, ckpt_format="torch_dist")
try:
    saving.save_checkpoint(refuse, 3)
except Own:
    pass
else:
    raise AssertionError("no error")

# Of a format that torch writes alone, an iteration that is saved anew is no checkpoint meanwhile;
# one that is saved to another place stays.
with tempfile.TemporaryDirectory() as save:
    told = argparse.Namespace(save=save, ckpt_format="torch_dcp")
    checkpointing.get_args = lambda: told
    index = pathlib.Path(save, "iter_0000003", ".metadata")
    index.parent.mkdir()
    index.touch()
    for elsewhere in ("non_persistent_ckpt", "release"):
        saving.save_checkpoint(lambda iteration, **kw: None, 3, **{elsewhere: True})
    assert index.exists()
    saving.save_checkpoint(lambda iteration: None, 3)
    assert index.exists() is (RANK != 0)

# The model's memory moves: the step follows it. What it cannot write is left to upstream.
model, optimizer = build(torch.bfloat16, True)
(part,) = optimizer.chained_optimizers
assert step(model, optimizer, 0)[0]
(bucket,) = (bucket for buffer in part.buffers for bucket in buffer.buckets)
part.prepare_grads()
first = part._found
assert first
part.prepare_grads()
assert part._found is first
bucket.param_data = bucket.param_data.clone()
with pytest.raises(RuntimeError, match="has left the buffer"):
    part.prepare_grads()
for param, (start, end, _) in part.buffers[0].param_index_map.items():
    param.data = bucket.param_data[start:end].view(param.shape)
part.prepare_grads()
storages = {v.untyped_storage().data_ptr() for v in part._found.values()}
assert storages == {bucket.param_data.untyped_storage().data_ptr()}
for name in ("fp8_param_gather", "fp4_param_gather"):
    had = getattr(part.ddp_config, name, False)
    setattr(part.ddp_config, name, True)
    part._found_for = None
    part.prepare_grads()
    assert part._found is None, name
    setattr(part.ddp_config, name, had)
part._found_for = None
part.prepare_grads()
assert part._found

# lr on the device, as a CUDA graph needs it; numbers in what is saved.
results = []
for in_graph in (False, True):
    model, optimizer = build(torch.bfloat16, True, optimizer_cuda_graph=in_graph)
    inner = optimizer.chained_optimizers[0].optimizer
    assert inner.fused is (True if in_graph else None)
    for _ in range(2):
        for group in inner.param_groups:
            if in_graph:
                group["lr"].fill_(0.25)
            else:
                group["lr"] = 0.25
        assert step(model, optimizer, 0)[0]
        saved = inner.state_dict()
        assert {type(g["lr"]) for g in saved["param_groups"]} == {float}
        inner.load_state_dict(saved)
    results.append([p.detach().clone() for p in model.parameters()])
for one, other in zip(*results, strict=True):
    torch.testing.assert_close(one, other)

# Hyperparameters reach the optimizer by their flags' names.
_, optimizer = build(torch.float32, True, s3_p=2.0, s3_beta=0.5, s3_nesterov=False)
(group, *_) = optimizer.chained_optimizers[0].optimizer.param_groups
assert (group["p"], group["beta"], group["nesterov"]) == (2.0, 0.5, False)

# A learning rate that is set later, in the groups; no other stands in for it until then.
for sharded in (False, True):
    model, optimizer = build(torch.float32, sharded, lr=None)
    (part,) = optimizer.chained_optimizers
    for group in part.optimizer.param_groups:
        assert group["lr"] is None and group.get("max_lr") is None
    assert part.config.lr is None
    with pytest.raises(ValueError, match="lr is None"):
        step(model, optimizer, 0)
    for group in part.optimizer.param_groups:
        group["lr"] = 0.25
    assert step(model, optimizer, 0)[0]

if RANK == 0:
    print("adapter: ok")
torch.distributed.destroy_process_group()
