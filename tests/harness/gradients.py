"""Gradients that a rank of Megatron's trainer changes before its optimizer reads them."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["change_gradients"]


def change_gradients(
    change: Callable[[torch.Tensor], object], first: int, last: int, *, reduced: bool
) -> None:
    """Changes the gradients of some iterations of the trainer in this process.

    Args:
        change: called with each buffer of gradients, in place.
        first, last: the iterations, both included.
        reduced: whether it sees them reduced over the ranks, or this rank's own.
    """
    from megatron.training import get_args, training

    original = training.finalize_model_grads

    def finalize_model_grads(model: list[Any], *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs) if reduced else None
        if first <= get_args().curr_iteration + 1 <= last:
            for chunk in model:
                for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                    change(buffer.grad_data)
        return result if reduced else original(model, *args, **kwargs)

    training.finalize_model_grads = finalize_model_grads
