"""Values of all ranks, and errors of one rank that are raised on all ranks."""

from typing import TypeVar

import torch

from megatron_s3.mcore.refusal import AllRanksError

__all__ = ["gathered", "raise_first"]

Value = TypeVar("Value")


def gathered(value: Value, group: torch.distributed.ProcessGroup | None = None) -> list[Value]:
    """Returns the values of all ranks in order, or this one's alone without a process group.

    Args:
        value: the value of this rank.
        group: the ranks that call this function; all ranks if None.
    """
    if not torch.distributed.is_initialized():
        return [value]
    values = [value] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group)
    return values


def raise_first(error: str | None, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Raises AllRanksError on all ranks with the error of the first rank that has one.

    Args:
        error: the error of this rank, None if it has none.
        group: the ranks that call this function; all ranks if None.
    """
    for first_error in filter(None, gathered(error, group)):
        first = 0 if group is None else torch.distributed.get_global_rank(group, 0)
        raise AllRanksError(first_error, first)
