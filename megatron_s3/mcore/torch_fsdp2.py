"""Torch FSDP2 under Megatron's checkpoints."""

from collections.abc import Callable
from typing import Any

from megatron_s3.mcore import state
from megatron_s3.mcore.checkpoint import param_groups

__all__ = ["optim_param_to_id_map", "restore_step"]


def optim_param_to_id_map(original: Callable[..., Any], optim_params_iter: Any) -> Any:
    """Wraps the map from parameters to their numbers; its keys become the ids of local tensors."""
    return original(getattr(param, "_local_tensor", param) for param in optim_params_iter)


def restore_step(saved: dict[str, Any]) -> None:
    """Restores the number of steps from a checkpoint whose tensors Megatron loads in place.

    Under torch FSDP2, in the format torch_dist, Megatron passes nothing else to the optimizer.

    Args:
        saved: the checkpoint's state dict.
    """
    built = state.running().optimizer()
    if built is None or "optimizer" not in saved:
        return
    optimizer = saved["optimizer"]
    groups = optimizer.get("optimizer", optimizer)["param_groups"]
    step = max(group["step"] for group in groups)  # all are equal in a run
    for part in built.parts:
        own = part.optimizer.param_groups
        for group in own:
            group["step"] = step
        if len(groups) == len(own):
            for group, its in zip(own, groups, strict=True):
                if "steps" in its:
                    group["steps"] = its["steps"]
        part.optimizer.counts.load(own)
        param_groups.restore_scheduled(part, groups)
