"""AdamW (Loshchilov and Hutter, 2019; torch.optim.AdamW), optionally with clipped updates."""

import math

from torch import Tensor

from megatron_s3.rules.kernel_form import KernelForm, with_kernel
from megatron_s3.rules.roots import square_root

__all__ = ["adamw_update"]


def _kernel_numbers(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
    clip_update: float | None = None,
) -> dict[str, float]:
    return {
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "eps": eps,
        "factor": 1 / correction1,
        "root_factor": 1 / correction2**0.5,
        "bound": math.inf if clip_update is None else clip_update,
    }


@with_kernel(
    KernelForm(
        "adamw",
        states=2,
        scalars=(
            *("beta1", "one_minus_beta1", "beta2", "one_minus_beta2"),
            *("eps", "factor", "root_factor", "bound"),
        ),
        numbers=_kernel_numbers,
    )
)
def adamw_update(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
    clip_update: float | None = None,
) -> Tensor:
    """Updates Adam's state with one gradient and returns ``(m / c1) / (sqrt(v) / sqrt(c2) + eps)``.

    Args:
        grad: the gradient; float32 or float64, any shape.
        exp_avg, exp_avg_sq: ``m`` and ``v``, updated in place; shape and dtype of ``grad``.
        beta1, beta2: their coefficients.
        eps: added to the denominator.
        correction1, correction2: ``1 - beta1**t`` and ``1 - beta2**t`` at step t, from 1.
        clip_update: the bound on every element of the update (1 in Figure 10 of the paper); None
            for Adam's update, which Theorem 1 bounds by 7.27 for betas (.9, .999).
    """
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(grad.square().mul_(1 - beta2))
    # Factors replace divisions by numbers, as torch's GPU kernels do.
    denominator = square_root(exp_avg_sq).mul_(1 / correction2**0.5).add_(eps)
    update = exp_avg.mul(1 / correction1).div_(denominator)
    return update if clip_update is None else update.clamp_(-clip_update, clip_update)
