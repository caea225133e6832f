"""Unpickles the objects of a checkpoint, of types that are known alone."""

from collections.abc import Iterable
from typing import Any, BinaryIO

import torch

__all__ = ["load"]


def load(file: BinaryIO, allowed: Iterable[Any]) -> Any:
    """Returns what ``torch.save`` wrote, if it is of torch's own types and those allowed.

    Args:
        file: open for reading.
        allowed: types and functions, or pairs of one and its name in the pickle.

    Raises:
        ValueError: it holds another type, or is damaged; nothing of it has been run.
    """
    try:
        with torch.serialization.safe_globals([*allowed]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
        raise ValueError((lines or [f"{type(error).__name__}: {error}"])[0]) from error
