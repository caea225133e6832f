"""Square roots that are the same bits on every device."""

import torch
from torch import Tensor

__all__ = ["square_root"]


def square_root(x: Tensor) -> Tensor:
    """Returns the square root, rounded to nearest, in a new tensor.

    Args:
        x: float32 or float64, any shape; float64's last bit on a CPU is torch's.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu":
        # torch's may be MKL's, which is not always rounded to nearest; through float64 it is.
        return x.double().sqrt_().float()
    return x.sqrt()
