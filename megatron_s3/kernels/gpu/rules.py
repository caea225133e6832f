"""The rules as Triton functions, named as their :class:`~megatron_s3.rules.kernel_form.KernelForm`.

A rule takes the gradient, its states and the scalars and variant of its form, in float32, and
returns the update ``u`` and the new states.  The arithmetic is that of :mod:`megatron_s3.rules`.
"""

import triton
import triton.language as tl

from megatron_s3.rules.kernel_form import Form, KernelForm, kernel_of
from megatron_s3.rules.s3 import s3_update
from megatron_s3.rules.sgdm import sgdm_update

__all__ = ["adamw", "adan", "lion", "nadam", "s3", "sgdm", "signsgd", "small"]


def _place(kernel: KernelForm, flag: str) -> tl.constexpr:
    """Returns the divisor that moves a flag of a variant to the lowest bits."""
    return tl.constexpr(1 << kernel.flag(flag)[0])


_WHOLE_P = _place(kernel_of(s3_update), "whole_p")
_WHOLE_PS = tl.constexpr(kernel_of(s3_update).flag("whole_p")[1] + 1)
_NESTEROV = _place(kernel_of(s3_update), "nesterov")
_FORGETS = _place(kernel_of(s3_update), "forgets")
_BOUNDED = _place(kernel_of(s3_update), "bounded")
_CAUTIOUS = _place(kernel_of(s3_update), "cautious")
_SGDM_NESTEROV = _place(kernel_of(sgdm_update), "nesterov")


def small(form: Form) -> bool:
    """Returns whether a rule needs few registers: it has no division and no square root.

    These are long sequences of instructions, which keep many values at once.
    """
    if form.kernel is kernel_of(s3_update):
        at, mask = form.kernel.flag("whole_p")
        return form.variant >> at & mask == 3
    return form.kernel.name in ("lion", "sgdm", "signsgd") and form.kernel.own


@triton.jit
def _inverse_cube_root(w):
    third = w.to(tl.int32, bitcast=True).to(tl.float32) * 0.3333333432674408
    y = (1419900000.0 - third).to(tl.int32).to(tl.float32, bitcast=True)
    c = 1.0 - ((w * y) * y) * y
    q = 0.12691685557365417 * c + 0.14565744996070862
    q = q * c + 0.17282718420028687
    q = q * c + 0.22221696376800537
    q = q * c + 0.3333333432674408
    return y + (c * y) * q


@triton.jit
def _power(x, p):
    return tl.exp2(p * tl.log2(x))


@triton.jit
def _average(of, beta, one_minus_beta, x):
    return beta * of + one_minus_beta * x


@triton.jit
def _limited(u, bound):
    u = tl.where(u > bound, bound, u)  # a NaN is not greater, and stays
    return tl.where(u < -bound, -bound, u)


@triton.jit
def _sign(x):
    # The sign of 0 and of NaN is 0, as in torch.
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def s3(g, states, scalars, VARIANT: tl.constexpr):
    """S3; for a p other than 1, 2 and 3 it differs by a few units in the last place."""
    P: tl.constexpr = VARIANT // _WHOLE_P % _WHOLE_PS  # 1, 2 or 3; 0 for any other p
    NESTEROV: tl.constexpr = VARIANT // _NESTEROV % 2
    FORGETS: tl.constexpr = VARIANT // _FORGETS % 2  # beta_s is 0
    BOUNDED: tl.constexpr = VARIANT // _BOUNDED % 2
    CAUTIOUS: tl.constexpr = VARIANT // _CAUTIOUS % 2
    m, r = states
    beta, one_minus_beta, beta_s, one_minus_beta_s, correction, bound, p, grad_bound = scalars
    if BOUNDED:
        limit = tl.where(r < 1.1754943508222875e-38, float("inf"), r * grad_bound)
        g = tl.where(g > limit, limit, g)
        g = tl.where(g < -limit, -limit, g)
    if FORGETS:
        r = tl.full(r.shape, 0.0, tl.float32)
    grad_bits = g.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    norm_bits = r.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    untouched = (grad_bits == 0) & (norm_bits < 0x00800000)

    share = one_minus_beta * g
    m = beta * m + share
    n = m
    if NESTEROV:
        n = beta * m + share

    magnitude = grad_bits.to(tl.float32, bitcast=True)
    # The bits of nonnegative numbers have the order of the numbers; NaN is the largest.
    largest = tl.maximum(grad_bits, norm_bits)
    if P == 0:
        # div_rn, not /, which gives 0 for divisors above 2**126.
        divisor = tl.where(untouched, 1.0, largest.to(tl.float32, bitcast=True))
        g_p = one_minus_beta_s * _power(tl.div_rn(magnitude, divisor), p)
        w = beta_s * _power(tl.div_rn(r, divisor), p) + g_p
        r = divisor * _power(w, 1.0 / p)
        if NESTEROV:
            w = beta_s * w + g_p
        u = tl.div_rn(tl.div_rn(n, divisor), _power(w, 1.0 / p))
    else:
        exponent = tl.maximum(largest & 0x7F800000, 0x00800000)
        factor = (0x7F800000 - exponent).to(tl.float32, bitcast=True)
        back = exponent.to(tl.float32, bitcast=True) * 0.5
        r = r * factor
        d = magnitude * factor
        n = n * factor
        if P == 2:
            r = r * r
            d = d * d
        if P == 3:
            r = (r * r) * r
            d = (d * d) * d
        g_p = one_minus_beta_s * d
        w = beta_s * r + g_p
        w2 = w
        if NESTEROV:
            w2 = beta_s * w + g_p
        if P == 1:
            r = back * w
            u = tl.div_rn(n, w2)
        elif P == 2:
            r = back * tl.sqrt_rn(w)
            u = tl.div_rn(n, tl.sqrt_rn(w2))
        else:
            y = _inverse_cube_root(w)
            r = back * ((w * y) * y)
            u = n * _inverse_cube_root(w2)
    u = u * correction
    r = tl.where(untouched, 0.0, r)
    u = tl.where(untouched, 0.0, u)
    if CAUTIOUS:
        u = tl.where(((u > 0) & (g <= 0)) | ((u < 0) & (g >= 0)), 0.0, u)
    return _limited(u, bound), (m, r)


@triton.jit
def adamw(g, states, scalars, VARIANT: tl.constexpr):
    """AdamW."""
    m, v = states
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, factor, root_factor, bound = scalars
    m = _average(m, beta1, one_minus_beta1, g)
    v = _average(v, beta2, one_minus_beta2, g * g)
    u = tl.div_rn(m * factor, tl.sqrt_rn(v) * root_factor + eps)
    return _limited(u, bound), (m, v)


@triton.jit
def nadam(g, states, scalars, VARIANT: tl.constexpr):
    """NAdam."""
    m, v = states
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_grad, weight_avg, factor = scalars
    m = _average(m, beta1, one_minus_beta1, g)
    v = _average(v, beta2, one_minus_beta2, g * g)
    u = tl.div_rn(g * weight_grad + m * weight_avg, tl.sqrt_rn(v * factor) + eps)
    return u, (m, v)


@triton.jit
def adan(g, states, scalars, VARIANT: tl.constexpr):
    """Adan."""
    m, v, n, previous = states
    beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3 = scalars[:6]
    eps, first, factor, weight_diff, root_factor = scalars[6:]
    d = g - tl.where(first != 0, g, previous)
    m = _average(m, beta1, one_minus_beta1, g)
    v = _average(v, beta2, one_minus_beta2, d)
    ahead = d * beta2 + g
    n = _average(n, beta3, one_minus_beta3, ahead * ahead)
    u = tl.div_rn(m * factor + v * weight_diff, tl.sqrt_rn(n) * root_factor + eps)
    return u, (m, v, n, g)


@triton.jit
def lion(g, states, scalars, VARIANT: tl.constexpr):
    """Lion."""
    (m,) = states
    beta1, one_minus_beta1, beta2, one_minus_beta2 = scalars
    u = _sign(_average(m, beta1, one_minus_beta1, g))
    return u, (_average(m, beta2, one_minus_beta2, g),)


@triton.jit
def sgdm(g, states, scalars, VARIANT: tl.constexpr):
    """SGD with momentum."""
    (v,) = states
    (momentum,) = scalars
    v = momentum * v + g
    u = v
    if VARIANT // _SGDM_NESTEROV % 2:
        u = momentum * v + g
    return u, (v,)


@triton.jit
def signsgd(g, states, scalars, VARIANT: tl.constexpr):
    """SignSGD."""
    (m,) = states
    momentum, one_minus_momentum = scalars
    m = _average(m, momentum, one_minus_momentum, g)
    return _sign(m), (m,)
