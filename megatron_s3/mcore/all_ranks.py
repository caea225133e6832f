"""Errors of one rank that are raised on all ranks."""

import torch

from megatron_s3.mcore.refusal import AllRanksError

__all__ = ["raise_first"]


def raise_first(error: str | None, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Raises AllRanksError on all ranks with the error of the first rank that has one.

    Args:
        error: the error of this rank, None if it has none.
        group: the ranks that call this function; all ranks if None.
    """
    first = 0
    if torch.distributed.is_initialized():
        errors: list[str | None] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(errors, error, group)
        error = next(filter(None, errors), None)
        first = torch.distributed.get_global_rank(group, 0) if group is not None else 0
    if error:
        raise AllRanksError(error, first)
