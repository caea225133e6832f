"""One rank of a job of any size, simulated in this process, in which Megatron builds its part.

torch's fake process group has any number of ranks, and tensors on the device "meta" have shape,
dtype and storage size, but no memory. Afterwards the process can be used for the CPU only
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
from megatron_s3.mcore.arguments.flags import CPU_DEFAULTS
from megatron_s3.mcore.output import quiet

__all__ = ["rank_of"]

#: Settings with which the model is built here. Numbers, shapes and dtypes of parameters do not
#: depend on them, and the CPU has no kernels for other values.
_HERE = {
    **CPU_DEFAULTS,
    "context_parallel_size": 1,  # divides activations; process groups are created before
    "moe_grouped_gemm": False,
    "perform_initialization": False,
    "sequence_parallel": False,  # divides activations
    "tp_comm_overlap": False,
}


@contextlib.contextmanager
def rank_of(args: argparse.Namespace, rank: int) -> Iterator[int]:
    """Makes this process a rank of a job for Megatron, with tensors without memory.

    Args:
        args: Megatron's validated arguments; the rank gets a copy.
        rank: number of the rank.

    Yields:
        The rank's pipeline stage.

    Raises:
        RuntimeError: there is a process group already.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.training import global_vars, initialize
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise RuntimeError("there is a process group already; plan in a separate process")
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
            gather = mock.patch.object(torch.distributed, "all_gather_object", _from_all)
            with gather, torch.device("meta"), _NoMemory():
                yield parallel_state.get_pipeline_model_parallel_rank()
        finally:
            global_vars.unset_global_variables()
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def _from_all(gathered: list[Any], said: Any, group: Any = None) -> None:
    """Lets all ranks report what this one reports; Megatron compares their parameter groups."""
    gathered[:] = [said] * len(gathered)


class _NoMemory(TorchFunctionMode):
    """Puts every tensor on the device "meta", whatever device was requested, with a GPU's type."""

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


#: The result of ``Tensor.type()`` on a GPU, by which DistributedOptimizer recognizes parameters.
_GPU_TYPES = {
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.float32: "torch.cuda.FloatTensor",
}
