"""Two data-parallel ranks: S3 on Megatron's torch FSDP2 wrapper, without the trainer."""

import copy

import torch
import torch.distributed

import megatron_s3

megatron_s3.register()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    TorchFullyShardedDataParallel,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer import optimizer as upstream  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: E402

from megatron_s3.mcore import build  # noqa: E402

torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
RANK = torch.distributed.get_rank()
COPIES = []


def noted(function):
    def note(self):
        COPIES.append(self)
        return function(self)

    return note


cls = upstream.Float16OptimizerWithFloat16Params
cls._copy_main_params_to_model_params = noted(cls._copy_main_params_to_model_params)


class Model(torch.nn.Module):
    """Sizes that two ranks share evenly and unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(40, 31)
        self.even = torch.nn.Parameter(torch.ones(8, 3))


def made(dtype: torch.dtype, sharded: bool, **settings):
    torch.manual_seed(0)
    bf16 = dtype == torch.bfloat16
    config = TransformerConfig(num_layers=1, hidden_size=40, num_attention_heads=1, bf16=bf16)
    model = Float16Module(config, Model()) if bf16 else Model()
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
    wrapper = TorchFullyShardedDataParallel if sharded else DistributedDataParallel
    model = wrapper(config, ddp, model)
    optimizer_config = OptimizerConfig(
        optimizer="s3",
        lr=0.1,
        weight_decay=0.5,
        bf16=bf16,
        params_dtype=dtype,
        use_distributed_optimizer=False,
        clip_grad=0.0,
    )
    for name, value in settings.items():
        setattr(optimizer_config, name, value)
    return model, get_megatron_optimizer(optimizer_config, [model])


def step(model, optimizer, seed: int) -> None:
    """With the same gradients whole and sharded, on both ranks."""
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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tensors(model, optimizer) -> list[torch.Tensor]:
    """The model's, the main parameters and every state, whole."""
    (part,) = optimizer.chained_optimizers
    inner = part.optimizer
    found = [p.detach() for p in model.parameters()]
    for group in inner.param_groups:
        for param in group["params"]:
            found += [param.detach(), *(inner.state[param][n] for n in ("exp_avg", "exp_pnorm"))]
    return [whole(tensor) for tensor in found]


for dtype in (torch.float32, torch.bfloat16):
    for settings in ({}, {"s3_no_fused": True}, {"clip_grad": 0.5}):
        results, norms = [], []
        for sharded in (False, True):
            COPIES.clear()
            model, optimizer = made(dtype, sharded, s3_beta_ramp=True, **settings)
            norms.append([step(model, optimizer, seed) for seed in range(3)])
            results.append(tensors(model, optimizer))
            fused = "s3_no_fused" not in settings
            (part,) = optimizer.chained_optimizers
            assert part.optimizer.path == ("C++ kernel" if fused else "portable: fused=False")
            assert len(COPIES) == (0 if fused or dtype == torch.float32 else 3), "not in one pass"
        if "clip_grad" in settings:
            torch.testing.assert_close(torch.tensor(norms[0]), torch.tensor(norms[1]))
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other)
            continue
        assert norms == [[0.0] * 3] * 2
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))

    # What --ckpt-format torch_dcp does: the template holds every state, and is loaded in place.
    model, optimizer = made(dtype, True, s3_beta_ramp=True)
    for seed in range(3):
        step(model, optimizer, seed)
    fresh, other = made(dtype, True, s3_beta_ramp=True)
    template = other.state_dict(is_loading=True)
    inner = template.get("optimizer", template)
    assert all(set(state) == {"exp_avg", "exp_pnorm"} for state in inner["state"].values())
    with torch.no_grad():
        for mine, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, two in zip(tensors(model, optimizer), tensors(fresh, other), strict=True):
        assert torch.equal(one, two)
    # And torch_dist, where the tensors alone are loaded.
    third = made(dtype, True, s3_beta_ramp=True)[1]
    build.restore_step({"optimizer": optimizer.state_dict()})
    for each in (optimizer, other, third):
        (part,) = each.chained_optimizers
        assert {group["step"] for group in part.optimizer.param_groups} == {3}
    # They go on alike.
    step(model, optimizer, 3)
    step(fresh, other, 3)
    for one, two in zip(tensors(model, optimizer), tensors(fresh, other), strict=True):
        assert torch.equal(one, two)

if RANK == 0:
    print("torch_fsdp2: ok")
torch.distributed.destroy_process_group()
