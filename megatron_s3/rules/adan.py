"""Adan (Xie et al., 2024), with decoupled weight decay (its ``no_prox`` form)."""

from torch import Tensor

from megatron_s3.rules.kernel_form import KernelForm, with_kernel
from megatron_s3.rules.roots import square_root

__all__ = ["adan_update"]


def _kernel_numbers(
    *,
    beta1: float,
    beta2: float,
    beta3: float,
    eps: float,
    first: bool,
    correction1: float,
    correction2: float,
    correction3: float,
) -> dict[str, float]:
    return {
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "beta3": beta3,
        "one_minus_beta3": 1 - beta3,
        "eps": eps,
        "first": first,
        "factor": 1 / correction1,
        "weight_diff": beta2 / correction2,
        "root_factor": 1 / correction3**0.5,
    }


@with_kernel(
    KernelForm(
        "adan",
        states=4,
        scalars=(
            *("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "beta3", "one_minus_beta3"),
            *("eps", "first", "factor", "weight_diff", "root_factor"),
        ),
        numbers=_kernel_numbers,
    )
)
def adan_update(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_diff: Tensor,
    exp_avg_sq: Tensor,
    previous_grad: Tensor,
    *,
    beta1: float,
    beta2: float,
    beta3: float,
    eps: float,
    first: bool,
    correction1: float,
    correction2: float,
    correction3: float,
) -> Tensor:
    """Updates the state with one gradient and returns the update.

    ``d = g - g'`` (0 at the first step); ``m``, ``v`` and ``n`` are averages of ``g``, ``d`` and
    ``(g + beta2 d)**2``; the update is ``(m / c1 + beta2 v / c2) / (sqrt(n / c3) + eps)``.

    Args:
        grad: the gradient; float32 or float64, any shape.
        exp_avg, exp_avg_diff, exp_avg_sq: ``m``, ``v`` and ``n``, updated in place.
        previous_grad: ``g'``, set to ``grad``.
        beta1, beta2, beta3: the coefficients of ``m``, ``v`` and ``n``: the fraction that is kept,
            as in the official code and the paper's lists (.98, .92, .99).
        eps: added to the denominator.
        first: whether this is the first step, which has no previous gradient.
        correction1, correction2, correction3: ``1 - beta**t`` of each at step t, from 1.
    """
    difference = grad - (grad if first else previous_grad)
    previous_grad.copy_(grad)
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    exp_avg_diff.mul_(beta2).add_(difference * (1 - beta2))
    ahead = difference.mul_(beta2).add_(grad)
    exp_avg_sq.mul_(beta3).add_(ahead.square_().mul_(1 - beta3))
    denominator = square_root(exp_avg_sq).mul_(1 / correction3**0.5).add_(eps)
    update = exp_avg.mul(1 / correction1).add_(exp_avg_diff * (beta2 / correction2))
    return update.div_(denominator)
