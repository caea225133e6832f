"""Torch FSDP2 under Megatron's checkpoints."""

from collections.abc import Callable
from typing import Any

__all__ = ["optim_param_to_id_map"]


def optim_param_to_id_map(original: Callable[..., Any], optim_params_iter: Any) -> Any:
    """Around the map from parameters to their numbers, whose keys are the ids of local tensors."""
    return original(getattr(param, "_local_tensor", param) for param in optim_params_iter)
