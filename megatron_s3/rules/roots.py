"""Square roots with the same bits on every device."""

import torch
from torch import Tensor

__all__ = ["square_root"]


def square_root(x: Tensor) -> Tensor:
    """Returns the square root, rounded to nearest, in a new tensor.

    Args:
        x: float32 or float64, any shape; in float64 on a CPU the last bit depends on torch.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu":
        # torch may use MKL, which does not always round to nearest; by way of float64 it does.
        return x.double().sqrt_().float()
    return x.sqrt()
