"""Two ranks: S3's sharded state through a checkpoint, with Transformer Engine and without.

Where it is not installed, Megatron is only told that it is: nothing of it would run here, but
Megatron's code for optimizers takes other branches (a step in the group, not beside each state).
"""

import shutil
import sys
import tempfile

import torch
import torch.distributed

import megatron_s3

megatron_s3.register()

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import (  # noqa: E402
    OptimizerConfig,
    distrib_optimizer,
    get_megatron_optimizer,
)
from megatron.core.transformer import TransformerConfig  # noqa: E402

torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
METADATA = {"distrib_optim_sharding_type": "dp_reshardable"}


def build(seed: int):
    torch.manual_seed(seed)
    config = TransformerConfig(num_layers=1, hidden_size=40, num_attention_heads=1)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp, torch.nn.Linear(40, 30))
    settings = OptimizerConfig(optimizer="s3", lr=0.1, use_distributed_optimizer=True, clip_grad=0)
    return model, get_megatron_optimizer(settings, [model])


def step(model, optimizer) -> None:
    model.zero_grad_buffer()
    for param in model.parameters():
        param.main_grad.copy_(torch.randn(param.shape))
    model.finish_grad_sync()
    assert optimizer.step()[0]


def tensors(optimizer):
    inner = optimizer.chained_optimizers[0].optimizer
    params = [p for g in inner.param_groups for p in g["params"]]
    return [t for p in params for t in (p, *inner.state[p].values())]


real = distrib_optimizer.HAVE_APEX_OR_TE
for engine in (True,) if real else (False, True):
    if not real:
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = engine
    for steps in (0, 3):
        model, optimizer = build(0)
        for _ in range(steps):
            step(model, optimizer)
        (directory,) = shared = [tempfile.mkdtemp()]
        torch.distributed.broadcast_object_list(shared)
        saved = optimizer.sharded_state_dict({}, metadata=METADATA)
        dist_checkpointing.save(saved, shared[0])
        other_model, other = build(1)
        template = other.sharded_state_dict({}, is_loading=True, metadata=METADATA)
        other.load_state_dict(dist_checkpointing.load(template, shared[0]))
        pairs = list(zip(tensors(optimizer), tensors(other), strict=True))
        assert len(pairs) % 3 == 0 and all(torch.equal(a, b) for a, b in pairs)
        group = other.chained_optimizers[0].optimizer.param_groups[0]
        assert (group["step"], group["algorithm"], group["p"]) == (steps, "s3", 3.0)
        for pair in ((model, optimizer), (other_model, other)):
            torch.manual_seed(7)
            step(*pair)
        assert all(
            torch.equal(a, b) for a, b in zip(tensors(optimizer), tensors(other), strict=True)
        )
        torch.distributed.barrier()
        shutil.rmtree(directory, ignore_errors=True)
if torch.distributed.get_rank() == 0:
    print("engine: ok", "(Transformer Engine)" if real else "", file=sys.stdout)
torch.distributed.destroy_process_group()
