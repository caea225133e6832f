"""Decisions that all ranks take alike because one of them found a reason."""

import torch

__all__ = ["raise_first"]


def raise_first(error: str | None, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Raises ValueError on all ranks with the error of the first that has one; else returns.

    Args:
        error: this rank's; None: it has none.
        group: the ranks that call this; all if None.
    """
    if torch.distributed.is_initialized():
        errors: list[str | None] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(errors, error, group)
        error = next(filter(None, errors), None)
    if error:
        raise ValueError(error)
