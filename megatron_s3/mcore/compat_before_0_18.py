"""Work-arounds for Megatron-Core before 0.18, to be deleted with support for older releases.

Also delete the calls of its functions, and ``distributed.isend`` in the table of
:mod:`megatron_s3.mcore.cpu_device`.
"""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["check_megatron_fsdp", "takes_defaults"]


def takes_defaults(pretrain: Callable[..., Any]) -> bool:
    """Returns whether Megatron's trainer parses its arguments itself."""
    return "cfg_container" not in inspect.signature(pretrain).parameters


def check_megatron_fsdp(args: argparse.Namespace) -> None:
    """Raises ValueError if validated arguments ask for something that Megatron-FSDP cannot do."""
    from megatron.core.distributed import DistributedDataParallelConfig

    if not args.use_distributed_optimizer:  # Megatron has this argument since then
        raise ValueError(
            "--use-megatron-fsdp needs --use-distributed-optimizer: without it this release of "
            "Megatron steps with gradients that are not the model's. Add it."
        )
    if getattr(args, "use_precision_aware_optimizer", False) and not hasattr(
        DistributedDataParallelConfig, "megatron_fsdp_use_decoupled_grad"
    ):
        raise ValueError(
            "--use-precision-aware-optimizer with --use-megatron-fsdp needs Megatron-Core 0.18: "
            "before, gradients are not where Megatron measures and clips them. Leave one of the "
            "two out."
        )
