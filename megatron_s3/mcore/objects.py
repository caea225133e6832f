"""The pickled objects of a checkpoint: arguments, param groups, schedules."""

from typing import Any, BinaryIO

import torch

__all__ = ["load"]


def load(file: BinaryIO) -> Any:
    """What ``torch.save`` wrote, of the types that Megatron itself puts into checkpoints alone.

    Raises:
        ValueError: it holds another type, or is damaged; nothing of it has been run.
    """
    from megatron.core.safe_globals import SAFE_GLOBALS

    try:
        with torch.serialization.safe_globals([*SAFE_GLOBALS]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
        raise ValueError((lines or [f"{type(error).__name__}: {error}"])[0]) from error
