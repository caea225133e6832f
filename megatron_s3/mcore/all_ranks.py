"""Errors of one rank that are raised on all ranks."""

import torch

__all__ = ["raise_first"]


def raise_first(error: str | None, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Raises ValueError on all ranks with the error of the first rank that has one.

    Args:
        error: the error of this rank, None if it has none.
        group: the ranks that call this function; all ranks if None.
    """
    if torch.distributed.is_initialized():
        errors: list[str | None] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(errors, error, group)
        error = next(filter(None, errors), None)
    if error:
        raise ValueError(error)
