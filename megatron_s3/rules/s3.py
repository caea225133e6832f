"""S3 (SoftSignSGD), Algorithm 1 of the paper, in a form that is stable in all of fp32's range.

Algorithm 1 keeps ``s``, the moving average of ``|g|**p``.  In fp32 with p=3 this underflows for
``|g|`` below about 1e-13 and stays at inf above 7e12.  Here the second state is ``r = s**(1/p)``, a
norm in the gradient's units, and numbers are divided by a power of two near ``M = max(r, |g|)``
before they are raised to a power, so that nothing underflows or overflows.

For p = 1, 2 and 3 in float32 the rule is one sequence of additions, multiplications, divisions and
square roots, each rounded once and never contracted to fused multiply-adds.  The kernels repeat
this sequence and give the same bits.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_s3.rules.kernel_form import KernelForm, with_kernel
from megatron_s3.rules.roots import square_root

__all__ = ["s3_beta_ramp", "s3_bound", "s3_correction", "s3_update", "s3_update_bound"]


def _kernel_numbers(
    *,
    beta: float,
    p: float,
    beta2: float | None = None,
    nesterov: bool = True,
    correction: float = 1.0,
    grad_bound: float | None = None,
    cautious: bool = False,
) -> dict[str, Any]:
    beta_s = beta if beta2 is None else beta2
    exact = p in (1, 2, 3)
    return {
        "beta": beta,
        "one_minus_beta": 1 - beta,
        "beta_s": beta_s,
        "one_minus_beta_s": 1 - beta_s,
        "correction": correction,
        "bound": s3_bound(beta, p, beta2, correction),
        "p": p,
        "grad_bound": 0.0 if grad_bound is None else grad_bound,
        "whole_p": int(p) if exact else 0,
        "nesterov": nesterov,
        "forgets": beta_s == 0,
        "bounded": grad_bound is not None,
        "cautious": cautious,
        "inexact": None if exact else f"p = 1, 2 and 3, not {p:g}",
    }


@with_kernel(
    KernelForm(
        "s3",
        states=2,
        # p is read where whole_p is 0, grad_bound where bounded is set.
        scalars=(
            *("beta", "one_minus_beta", "beta_s", "one_minus_beta_s"),
            *("correction", "bound", "p", "grad_bound"),
        ),
        flags={"whole_p": 2, "nesterov": 1, "forgets": 1, "bounded": 1, "cautious": 1},
        numbers=_kernel_numbers,
    )
)
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
    grad_bound: float | None = None,
    cautious: bool = False,
) -> Tensor:
    """Updates S3's state with one gradient and returns the update ``u = n / b``.

    Args:
        grad: the gradient ``g``; float32 or float64, any shape.
        exp_avg: ``m``, updated in place; shape and dtype of ``grad``.
        exp_pnorm: ``r = s**(1/p)``, updated in place; shape and dtype of ``grad``.
        beta: coefficient of both averages, or of ``m`` alone if ``beta2`` is given.
        p: order of the denominator's momentum, any real >= 1.
        beta2: coefficient of ``s`` (Tables III and IV, "diff. beta"); None means ``beta``.
        nesterov: whether to take lines 6 and 7 of Algorithm 1; False gives ``m / s**(1/p)``
            (tables: "w/o NAG").
        correction: factor on ``u``, from :func:`s3_correction`; 1 is the paper's S3.
        grad_bound: limits every element of the gradient to this multiple of its ``r`` of the
            previous step (not in the paper); None does not.  An element whose ``r`` is below the
            smallest normal number, as in the first step, is not limited.  The rest is S3 on the
            limited gradients, so Theorem 2 holds.  An infinite gradient becomes the limit; a NaN
            stays.

            A row of an embedding that is seldom used forgets its ``r`` between uses (nine tenths
            of it in about ``p ln(10) / (1 - beta)`` steps, 138 with the defaults), and its next
            gradient is limited.  That step differs little, because ``u`` is a ratio: after a long
            pause, ``u`` is ``(1 + beta**2 / ((1 - beta**2) grad_bound**p))**(-1/p)`` times its
            value without a bound, 0.997 for 10.  But while ``r`` grows back (see S3's
            ``grad_bound``), by one factor at each use of the row, ``u`` is nearly the sign of the
            last gradient.
        cautious: whether ``u`` is 0 where its sign is not that of the gradient (not in the paper;
            Liang et al., "Cautious Optimizers", arXiv:2411.16085, whose factor on the rest is left
            out, because it would depend on how a tensor is sharded).  ``u`` of an element whose
            gradient is 0 is then 0.

    Returns:
        ``u``, shape and dtype of ``grad``; ``|u|`` never exceeds :func:`s3_update_bound` times
        ``correction``, and with one shared beta never 1.  An element whose gradient is 0 and whose
        ``r`` is below the smallest normal number (1e-38 in float32) counts as never touched: ``r``
        and ``u`` are 0.  A NaN or infinite gradient permanently makes ``r`` and ``u`` of its
        element NaN and ``m`` non-finite; other elements are not affected.
    """
    beta_s = beta if beta2 is None else beta2

    if grad_bound is not None:
        limit = exp_pnorm * grad_bound
        limit.masked_fill_(exp_pnorm < torch.finfo(grad.dtype).tiny, math.inf)
        grad = torch.where(grad > limit, limit, grad)
        grad = torch.where(grad < limit.neg_(), limit, grad)
        del limit
    share = grad * (1 - beta)  # not add_(grad, alpha=...), which torch contracts where it can
    m = exp_avg.mul_(beta).add_(share)
    n = m.mul(beta).add_(share) if nesterov else m.clone()
    del share

    magnitude = grad.abs()
    if beta_s == 0:
        exp_pnorm.zero_()  # it does not enter the result, so it must not set the scale
    # r == 0 would not do: after thousands of zero gradients rounding stops the decay of m and r at
    # a denormal number, and their quotient would move the parameter by a third of lr every step.
    untouched = (grad == 0) & (exp_pnorm < torch.finfo(grad.dtype).tiny)
    scaled, unscaled = _scaling(torch.maximum(exp_pnorm, magnitude), untouched, p)
    g_p = _power(scaled(magnitude), p).mul_(1 - beta_s)
    del magnitude
    w = _power(scaled(exp_pnorm), p).mul_(beta_s).add_(g_p)
    exp_pnorm.copy_(unscaled(_root(w, p))).masked_fill_(untouched, 0)
    if nesterov:
        w = w.mul_(beta_s).add_(g_p)
    # n is scaled first: it then has the magnitude of the root, and their ratio is at most 1.
    u = _over_root(scaled(n), w, p)
    if correction != 1:
        u = u.mul_(correction)
    u = u.masked_fill_(untouched, 0)
    if cautious:
        # A NaN has no sign, and stays.
        u = u.masked_fill_((u > 0) & (grad <= 0) | (u < 0) & (grad >= 0), 0)
    # The theorem bounds exact arithmetic; the clamp enforces it after the last rounding.
    bound = s3_bound(beta, p, beta2, correction)
    return u if math.isinf(bound) else u.clamp_(-bound, bound)


def s3_bound(beta: float, p: float, beta2: float | None = None, correction: float = 1.0) -> float:
    """Returns the bound at which an update is clamped: Theorem 2's, or ``inf`` if there is none.

    With one shared beta it is 1, also with bias correction.  Arguments as for :func:`s3_update`.
    """
    if beta2 is None or beta2 == beta:
        return 1.0
    return s3_update_bound(beta, p, beta2) * correction


def s3_update_bound(beta: float, p: float, beta2: float | None = None) -> float:
    """Returns the largest ``|n / b|`` of any sequence of gradients, by Theorem 2 (1) and (2).

    Args:
        beta: coefficient of ``m`` and ``n``.
        p: order of the denominator's momentum.
        beta2: coefficient of ``s`` and ``b``; None or equal to ``beta`` gives 1.

    Returns:
        The bound; ``inf`` if the theorem's condition ``beta < beta2**(1/p)`` fails.
    """
    if beta2 is None or beta2 == beta:
        return 1.0
    if p == 1:  # the limit q -> inf of equation (4)
        return (1 - beta) / (1 - beta2) if beta <= beta2 else math.inf
    q = p / (p - 1)
    if beta2 == 0:
        return math.inf
    ratio = beta / beta2 ** (1 / p)
    if ratio >= 1:  # its power may be too large for a float
        return math.inf
    ratio **= q
    return float((1 - beta) / ((1 - beta2) ** (1 / p) * (1 - ratio) ** (1 / q)))


def s3_correction(
    step: int, *, beta: float, p: float, beta2: float | None = None, nesterov: bool = True
) -> float:
    """Returns the factor that corrects the bias of averages that begin at 0 (not in the paper).

    After ``t`` steps the weights in ``n`` sum to ``1 - beta**(t+1)`` (without Nesterov, those in
    ``m`` to ``1 - beta**t``); dividing numerator and ``b**p`` by their sums gives the factor.

    Args:
        step: ``t``, counted from 1.
        beta, p, beta2, nesterov: as for :func:`s3_update`.
    """
    beta_s = beta if beta2 is None else beta2
    k = step + 1 if nesterov else step
    return float((1 - beta_s**k) ** (1 / p) / (1 - beta**k))


def s3_beta_ramp(step: int, beta: float) -> float:
    """Returns ``min(beta, (t - 1) / (t + 8))``: both averages are short at first.

    The coefficient grows from 0 in the first step to ``beta`` (0.95 in step 172).  It needs no
    state and no bias correction: the weights in an average sum to 1 from the first step on.  While
    ``m`` and ``s`` share the coefficient of every step, they have the same weights, and
    ``|n / b| <= 1`` by the inequality of power means, as in Theorem 2 (not in the paper).

    With another ``beta2``, ramped likewise, :func:`s3_update_bound` of the two coefficients ``c``
    and ``d`` of a step holds in every step.  By Hölder's inequality the largest
    ``(|m| / s**(1/p))**q`` follows ``V <- R V + K`` with ``R = (c / d**(1/p))**q`` and
    ``K = ((1-c) / (1-d)**(1/p))**q``, and that bound is its fixed point ``(K / (1-R))**(1/q)``.
    Starting from ``V = 1`` at ``c = d = 0``, V stays below the fixed point as long as that
    never falls; and it is 1 while c = d and grows as they part, from whichever is held first.
    Nesterov's n and b are one more such step with the same gradient.

    Args:
        step: ``t``, counted from 1.
        beta: the final coefficient.
    """
    return min(beta, (step - 1) / (step + 8))


#: For each dtype: an integer of its size, its exponent's bits, the smallest normal number's bits.
_BITS = {
    torch.float32: (torch.int32, 0x7F800000, 0x00800000),
    torch.float64: (torch.int64, 0x7FF0000000000000, 0x0010000000000000),
}


def _scaling(
    largest: Tensor, untouched: Tensor, p: float
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Returns two functions: to a scale on which powers are safe, and back.

    On that scale ``largest`` is in [2, 4) for p = 1, 2 and 3, where the factor is a power of two
    (if ``largest`` is inf or NaN, the factor is 0 and everything becomes NaN), and 1 for any other
    p.  The memory of ``largest`` may be reused.
    """
    if p not in (1, 2, 3):
        divisor = largest.masked_fill_(untouched, 1)
        return lambda x: x / divisor, lambda x: x.mul_(divisor)
    integer, exponent, smallest = _BITS[largest.dtype]
    bits = largest.view(integer).bitwise_and_(exponent).clamp_(min=smallest)
    factor = (exponent - bits).view(largest.dtype)
    back = bits.view(largest.dtype).mul_(0.5)
    return lambda x: x * factor, lambda x: x.mul_(back)


def _power(x: Tensor, p: float) -> Tensor:
    """Returns ``x**p``; it may reuse x.  For p = 1, 2 and 3 it multiplies; pow takes ten times."""
    if p == 1:
        return x
    if p == 2:
        return x.square_()
    if p == 3:
        return x.square().mul_(x)
    return _pow(x, p)


def _root(x: Tensor, p: float) -> Tensor:
    """Returns ``x**(1/p)`` in a new tensor."""
    if p == 1:
        return x.clone()
    if p == 2:
        return square_root(x)
    if p == 3 and x.dtype == torch.float32:
        y = _inverse_cube_root(x)
        return (x * y).mul_(y)
    return _pow(x, 1 / p)


def _over_root(n: Tensor, x: Tensor, p: float) -> Tensor:
    """Returns ``n / x**(1/p)``; it may reuse n."""
    if p == 3 and x.dtype == torch.float32:
        return n.mul_(_inverse_cube_root(x))
    return n.div_(_root(x, p))


# (1 - c)**(-1/3) = 1 + c * (polynomial in c), minimax over |c| < 0.1021, rounded to float32.
_CUBE_ROOT = (
    0.3333333432674408,
    0.22221696376800537,
    0.17282718420028687,
    0.14565744996070862,
    0.12691685557365417,
)


def _inverse_cube_root(x: Tensor) -> Tensor:
    """Returns ``x**(-1/3)`` of float32, with a relative error below 1e-7 for x in [2**-66, 2**7].

    A third of the bits is a first guess (within 3.5 %), and one polynomial step refines it.  There
    is no special function, whose last bit would differ between machines.
    """
    third = x.view(torch.int32).to(torch.float32).mul_(1 / 3)
    y = third.neg_().add_(1419900000.0).to(torch.int32).view(torch.float32)
    del third
    c = (x * y).mul_(y).mul_(y).neg_().add_(1)
    q = torch.full_like(c, _CUBE_ROOT[-1])
    for coefficient in reversed(_CUBE_ROOT[:-1]):
        q.mul_(c).add_(coefficient)
    return c.mul_(y).mul_(q).add_(y)


def _pow(x: Tensor, exponent: float) -> Tensor:
    """Returns ``x**exponent``, with bits that do not depend on an element's place in ``x``.

    On a CPU torch computes the last few elements with another pow than the vectors before them.
    Padded to whole vectors, an update does not depend on how parameters are sharded.
    """
    padding = -x.numel() % 64
    if x.device.type != "cpu" or padding == 0:
        return x.pow(exponent)
    padded = torch.nn.functional.pad(x.reshape(-1), (0, padding), value=1.0)
    return padded.pow_(exponent)[: x.numel()].view(x.shape)
