"""Decisions that all ranks take alike because one of them found a reason."""

import torch

__all__ = ["raise_first"]


def raise_first(error: str | None) -> None:
    """Raises ValueError on all ranks with the error of the first that has one; else returns.

    Args:
        error: this rank's; None: it has none.
    """
    if torch.distributed.is_initialized():
        errors: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, error)
        error = next(filter(None, errors), None)
    if error:
        raise ValueError(error)
