"""S3 (SoftSignSGD), Algorithm 1 of the paper, in a form that holds over all of fp32.

Algorithm 1 keeps ``s``, the moving average of ``|g|**p``.  In fp32 with p=3 that underflows below
``|g|`` of about 1e-13 and sticks at inf above 7e12.  Here the second state is ``r = s**(1/p)``, a
norm with the gradient's own units, and every power is taken of a ratio to ``M = max(r, |g|)``, so
that nothing leaves [0, 1] whatever the gradient's magnitude and whatever p.
"""

import math

import torch
from torch import Tensor

__all__ = ["s3_correction", "s3_update", "s3_update_bound"]


def s3_update(
    grad: Tensor,
    exp_avg: Tensor,
    exp_pnorm: Tensor,
    *,
    beta: float,
    p: float,
    beta2: float | None = None,
    nesterov: bool = True,
    correction: float = 1.0,
) -> Tensor:
    """Advances S3's state by one gradient and returns the update ``u = n / b``.

    Args:
        grad: the gradient ``g``; float32 or float64, any shape.
        exp_avg: ``m``, advanced in place; shape and dtype of ``grad``.
        exp_pnorm: ``r = s**(1/p)``, advanced in place; shape and dtype of ``grad``.
        beta: coefficient of both averages, or of ``m`` alone where ``beta2`` is given.
        p: order of the denominator's momentum, any real >= 1.
        beta2: coefficient of ``s`` (Tables III and IV, "diff. beta"); None shares ``beta``.
        nesterov: lines 6 and 7 of Algorithm 1; False takes ``m / s**(1/p)`` (tables: "w/o NAG").
        correction: factor on ``u``, from :func:`s3_correction`; 1 is the paper's S3.

    Returns:
        ``u``, shape and dtype of ``grad``; ``|u|`` never exceeds :func:`s3_update_bound` times
        ``correction``, and with one shared beta never 1.  An element whose gradient is 0 and whose
        ``r`` is below the smallest normal number (1e-38 in float32) counts as never touched: ``r``
        and ``u`` are 0.  A NaN or infinite gradient makes its own element's ``r`` and ``u`` NaN and
        its ``m`` non-finite, for good, and no other's.
    """
    beta_s = beta if beta2 is None else beta2

    m = exp_avg.mul_(beta).add_(grad, alpha=1 - beta)
    n = m.mul(beta).add_(grad, alpha=1 - beta) if nesterov else m.clone()

    magnitude = grad.abs()
    if beta_s == 0:
        exp_pnorm.zero_()  # nothing of it remains, so it must not set the scale either
    largest = torch.maximum(exp_pnorm, magnitude)
    # Not r == 0: after thousands of zero gradients rounding stops the decay of both m and r at some
    # denormal number, and their quotient would move the parameter by a third of lr for ever.
    untouched = (grad == 0) & (exp_pnorm < torch.finfo(grad.dtype).tiny)
    divisor = largest.masked_fill(untouched, 1)
    g_p = _power(magnitude.div_(divisor), p)
    w = _power(exp_pnorm.div(divisor), p).mul_(beta_s).add_(g_p, alpha=1 - beta_s)
    denominator = _root(w, p)
    torch.mul(largest, denominator, out=exp_pnorm)
    if nesterov:
        denominator = _root(w.mul_(beta_s).add_(g_p, alpha=1 - beta_s), p)
    # n / M first: both are of the gradient's magnitude, their ratio is at most 1.
    u = n.div_(divisor).div_(denominator).mul_(correction).masked_fill_(untouched, 0)
    bound = 1.0 if beta_s == beta else s3_update_bound(beta, p, beta2) * correction
    # The theorem bounds exact arithmetic; the clamp carries it over the last rounding.
    return u if math.isinf(bound) else u.clamp_(-bound, bound)


def s3_update_bound(beta: float, p: float, beta2: float | None = None) -> float:
    """Theorem 2 (1) and (2): the largest ``|n / b|`` that any sequence of gradients can cause.

    Args:
        beta: coefficient of ``m`` and ``n``.
        p: order of the denominator's momentum.
        beta2: coefficient of ``s`` and ``b``; None or equal to ``beta`` gives 1.

    Returns:
        The bound, ``inf`` where the theorem's condition ``beta < beta2**(1/p)`` fails.
    """
    if beta2 is None or beta2 == beta:
        return 1.0
    if p == 1:  # the limit q -> inf of equation (4)
        return (1 - beta) / (1 - beta2) if beta <= beta2 else math.inf
    q = p / (p - 1)
    if beta2 == 0:
        return math.inf
    ratio = (beta / beta2 ** (1 / p)) ** q
    if ratio >= 1:
        return math.inf
    return (1 - beta) / ((1 - beta2) ** (1 / p) * (1 - ratio) ** (1 / q))


def s3_correction(
    step: int, *, beta: float, p: float, beta2: float | None = None, nesterov: bool = True
) -> float:
    """The factor that removes the bias of averages begun at 0 (not in the paper; opt-in).

    After ``t`` steps the weights in ``n`` sum to ``1 - beta**(t+1)`` (without Nesterov, those in
    ``m`` to ``1 - beta**t``); dividing numerator and ``b**p`` by their sums gives the factor.

    Args:
        step: ``t``, counted from 1.
        beta, p, beta2, nesterov: as for :func:`s3_update`.
    """
    beta_s = beta if beta2 is None else beta2
    k = step + 1 if nesterov else step
    return (1 - beta_s**k) ** (1 / p) / (1 - beta**k)


def _power(x: Tensor, p: float) -> Tensor:
    """``x**p``, may reuse x; by multiplication where p is small and whole (pow costs 10 times)."""
    if p == 1:
        return x
    if p == 2:
        return x.square_()
    if p == 3:
        return x.mul_(x.square())
    return _pow(x, p)


def _root(x: Tensor, p: float) -> Tensor:
    """``x**(1/p)`` in a new tensor."""
    if p == 1:
        return x.clone()
    return x.sqrt() if p == 2 else _pow(x, 1 / p)


def _pow(x: Tensor, exponent: float) -> Tensor:
    """``x**exponent``, the same to the last bit wherever in ``x`` an element lies.

    On a CPU torch takes another pow for the last few elements than for the vectors before them;
    padded to whole vectors, an update does not depend on how parameters are cut into shards.
    """
    padding = -x.numel() % 64
    if x.device.type != "cpu" or padding == 0:
        return x.pow(exponent)
    padded = torch.nn.functional.pad(x.reshape(-1), (0, padding), value=1.0)
    return padded.pow_(exponent)[: x.numel()].view(x.shape)
