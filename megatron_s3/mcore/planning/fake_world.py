"""One rank of a job of any size, in this process alone, for Megatron to build its part in.

torch's fake process group has as many ranks as it is told, and tensors on the device "meta" have
shape, dtype and storage of a size, but no memory. After its use the process is one for the CPU
(:mod:`megatron_s3.mcore.cpu_device`).
"""

import argparse
import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from megatron_s3.mcore import cpu_device
from megatron_s3.mcore.arguments import CPU_DEFAULTS
from megatron_s3.mcore.output import quiet

__all__ = ["rank_of"]

#: Settings that the model is built with here: neither number, shape nor dtype of a parameter
#: depends on them, and the CPU has no kernels for others.
_HERE = {
    **CPU_DEFAULTS,
    "context_parallel_size": 1,  # divides activations; process groups are made before
    "moe_grouped_gemm": False,
    "perform_initialization": False,
    "sequence_parallel": False,  # divides activations
    "tp_comm_overlap": False,
}


@contextlib.contextmanager
def rank_of(args: argparse.Namespace, rank: int) -> Iterator[int]:
    """Makes this process a rank of a job as Megatron sees it, whose tensors have no memory.

    Args:
        args: Megatron's, validated; the rank gets a copy.
        rank: which.

    Yields:
        Its pipeline stage.

    Raises:
        RuntimeError: a process group is there already.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.training import global_vars, initialize
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise RuntimeError("a process group is there already: plan in a process of its own")
    cpu_device.use_cpu()
    own = copy.copy(args)
    own.rank = rank
    own.use_gloo_process_groups = False
    torch.distributed.init_process_group(
        "cpu:fake,meta:fake", rank=rank, world_size=own.world_size, store=FakeStore()
    )
    with quiet():
        try:
            global_vars.set_args(own)
            initialize._initialize_distributed(None, None, None)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            for name, value in _HERE.items():
                if hasattr(own, name):
                    setattr(own, name, value)
            with _as_all(), torch.device("meta"), _NoMemory():
                yield parallel_state.get_pipeline_model_parallel_rank()
        finally:
            global_vars.unset_global_variables()
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _as_all() -> Iterator[None]:
    """Has every rank say what this one says: Megatron compares their parameter groups."""

    def all_gather_object(gathered: list[Any], said: Any, group: Any = None) -> None:
        gathered[:] = [said] * len(gathered)

    with mock.patch.object(torch.distributed, "all_gather_object", all_gather_object):
        yield


class _NoMemory(TorchFunctionMode):
    """Puts every tensor on the device "meta", wherever it was asked for, under a GPU's type."""

    def __torch_function__(
        self,
        func: Any,
        kinds: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.pin_memory):
            return args[0]
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if func is torch.Tensor.to:
            args = tuple("meta" if isinstance(a, str | int | torch.device) else a for a in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _GPU_TYPES[args[0].dtype]
        return func(*args, **kwargs)


#: What ``Tensor.type()`` says on a GPU: DistributedOptimizer tells parameters by it.
_GPU_TYPES = {
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.float32: "torch.cuda.FloatTensor",
}
