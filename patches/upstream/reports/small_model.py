"""A small model and its optimizer, for the reproductions: on GPUs, or on CPUs with gloo."""

import logging
import os
import sys
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CudaIsCpu(TorchFunctionMode):
    """Lets Megatron-core build, step and save on a machine without a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            # How Megatron-core finds bf16 and fp16.
            return "torch.cuda." + result.rpartition(".")[2]
        return result


if not torch.cuda.is_available():
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.current_stream = lambda: None
    CudaIsCpu().__enter__()

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402


def start() -> None:
    """Makes the process groups of torchrun's ranks, or of this process alone."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(backend)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, rank=0, world_size=1, store=store)
    parallel_state.initialize_model_parallel()


def build(
    optimizer: str = "adam",
    lr: float = 0.1,
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = True,
    bucket_size: int | None = None,
) -> tuple[torch.nn.Module, Any]:
    """Returns two linear layers (0: 40 to 30, 1: 30 to 20) in DDP, and their optimizer."""
    half = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    shape = TransformerConfig(num_layers=1, hidden_size=40, num_attention_heads=1, **half)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
    layers.config = shape
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=sharded,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=bucket_size is not None,  # or there is one bucket
        bucket_size=bucket_size,
    )
    model = DistributedDataParallel(shape, ddp, Float16Module(shape, layers))
    config = OptimizerConfig(
        optimizer=optimizer,
        lr=lr,
        clip_grad=0.0,
        params_dtype=dtype,
        use_distributed_optimizer=sharded,
        **half,
    )
    return model, get_megatron_optimizer(config, [model])


def step(model: torch.nn.Module, optimizer: Any) -> Any:
    """Takes a step with random gradients, other ones on each rank; returns what it returns."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    torch.manual_seed(torch.distributed.get_rank())
    for param in model.parameters():
        param.main_grad.copy_(torch.randn(param.shape))
    model.finish_grad_sync()
    return optimizer.step()


def end(fault: str | None) -> None:
    """Prints the result and exits: with status 1 and the fault, or with 0 if there is none."""
    if torch.distributed.get_rank() == 0:
        print(f"FAULT: {fault}" if fault else "no fault", flush=True)
    torch.distributed.destroy_process_group()
    sys.exit(1 if fault else 0)
