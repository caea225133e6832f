"""Lion (Chen et al., 2023)."""

from torch import Tensor

from megatron_s3.rules.kernel_form import KernelForm, with_kernel

__all__ = ["lion_update"]


def _kernel_numbers(*, beta1: float, beta2: float) -> dict[str, float]:
    return {
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
    }


@with_kernel(
    KernelForm(
        "lion",
        states=1,
        scalars=("beta1", "one_minus_beta1", "beta2", "one_minus_beta2"),
        numbers=_kernel_numbers,
    )
)
def lion_update(grad: Tensor, exp_avg: Tensor, *, beta1: float, beta2: float) -> Tensor:
    """Updates the momentum with one gradient and returns ``sign(beta1 m + (1 - beta1) g)``.

    Args:
        grad: the gradient; float32 or float64, any shape.
        exp_avg: ``m``, updated in place with ``beta2`` after it was used.
        beta1: coefficient of ``m`` in the update.
        beta2: coefficient of ``m`` itself.
    """
    update = exp_avg.mul(beta1).add_(grad * (1 - beta1)).sign_()
    exp_avg.mul_(beta2).add_(grad * (1 - beta2))
    return update
