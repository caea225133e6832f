"""SignSGD (Bernstein et al., 2018), with or without momentum (Signum)."""

from torch import Tensor

from megatron_s3.rules.kernel_form import KernelForm, with_kernel

__all__ = ["signsgd_update"]


def _kernel_numbers(*, momentum: float) -> dict[str, float]:
    return {"momentum": momentum, "one_minus_momentum": 1 - momentum}


@with_kernel(
    KernelForm(
        "signsgd",
        states=1,
        scalars=("momentum", "one_minus_momentum"),
        numbers=_kernel_numbers,
    )
)
def signsgd_update(grad: Tensor, exp_avg: Tensor, *, momentum: float) -> Tensor:
    """Updates the momentum with one gradient and returns its sign.

    Args:
        grad: the gradient; float32 or float64, any shape.
        exp_avg: ``m``, updated in place to ``momentum m + (1 - momentum) g``.
        momentum: its coefficient; with 0, ``m`` is ``g``.
    """
    return exp_avg.mul_(momentum).add_(grad * (1 - momentum)).sign()
