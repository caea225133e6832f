"""AdEMAMix as a Triton function."""

import triton
import triton.language as tl


@triton.jit
def ademamix(g, states, scalars, VARIANT: tl.constexpr):
    """Returns the update and the new states, all of it in float32."""
    m1, m2, v = states
    beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3 = scalars[:6]
    alpha, eps, factor1, factor2 = scalars[6:]
    m1 = beta1 * m1 + one_minus_beta1 * g
    m2 = beta3 * m2 + one_minus_beta3 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    u = tl.div_rn(m1 * factor1 + m2 * alpha, tl.sqrt_rn(v * factor2) + eps)
    return u, (m1, m2, v)
