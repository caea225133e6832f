"""Lion (Chen et al., 2023)."""

from torch import Tensor

__all__ = ["lion_update"]


def lion_update(grad: Tensor, exp_avg: Tensor, *, beta1: float, beta2: float) -> Tensor:
    """Advances the momentum by one gradient and returns ``sign(beta1 m + (1 - beta1) g)``.

    Args:
        grad: the gradient; float32 or float64, any shape.
        exp_avg: ``m``, advanced in place with ``beta2`` after it was used.
        beta1: coefficient of ``m`` in the update.
        beta2: coefficient of ``m`` itself.
    """
    update = exp_avg.mul(beta1).add_(grad * (1 - beta1)).sign_()
    exp_avg.mul_(beta2).add_(grad * (1 - beta2))
    return update
