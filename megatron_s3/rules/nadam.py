"""NAdam (Dozat, 2016), the same as torch.optim.NAdam with decoupled weight decay."""

from torch import Tensor

from megatron_s3.rules.kernel_form import KernelForm, with_kernel
from megatron_s3.rules.roots import square_root

__all__ = ["nadam_update"]


def _kernel_numbers(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_grad: float,
    weight_avg: float,
    correction2: float,
) -> dict[str, float]:
    return {
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "eps": eps,
        "weight_grad": weight_grad,
        "weight_avg": weight_avg,
        "factor": 1 / correction2,
    }


@with_kernel(
    KernelForm(
        "nadam",
        states=2,
        scalars=(
            *("beta1", "one_minus_beta1", "beta2", "one_minus_beta2"),
            *("eps", "weight_grad", "weight_avg", "factor"),
        ),
        numbers=_kernel_numbers,
    )
)
def nadam_update(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_grad: float,
    weight_avg: float,
    correction2: float,
) -> Tensor:
    """Updates the state with one gradient and returns ``(wg g + wm m) / (sqrt(v / c2) + eps)``.

    Args:
        grad: the gradient; float32 or float64, any shape.
        exp_avg, exp_avg_sq: ``m`` and ``v``, updated in place; shape and dtype of ``grad``.
        beta1, beta2: their coefficients.
        eps: added to the denominator.
        weight_grad: ``(1 - mu_t) / (1 - mu_1 ... mu_t)``.
        weight_avg: ``mu_{t+1} / (1 - mu_1 ... mu_{t+1})``.
        correction2: ``1 - beta2**t`` at step t, from 1.
    """
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(grad.square().mul_(1 - beta2))
    denominator = square_root(exp_avg_sq * (1 / correction2)).add_(eps)
    return grad.mul(weight_grad).add_(exp_avg * weight_avg).div_(denominator)
