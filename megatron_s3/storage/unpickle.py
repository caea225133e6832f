"""Unpickling of a checkpoint's objects, restricted to known types."""

from collections.abc import Iterable
from typing import Any, BinaryIO

import torch

__all__ = ["load"]


def load(file: BinaryIO, allowed: Iterable[Any]) -> Any:
    """Returns an object that ``torch.save`` wrote, if it has only torch's and the allowed types.

    Args:
        file: the file, open for reading.
        allowed: types and functions, or pairs of one of these and its name in the pickle.

    Raises:
        ValueError: it holds another type, or is damaged; no code of it was run.
    """
    try:
        with torch.serialization.safe_globals([*allowed]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
        raise ValueError((lines or [f"{type(error).__name__}: {error}"])[0]) from error
