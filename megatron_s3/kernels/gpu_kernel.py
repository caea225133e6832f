"""The fused step as a Triton kernel: one program a chunk, one launch for all tensors of a group.

A row of the table describes one tensor: the addresses of parameter, gradient, exp_avg, exp_pnorm
and model parameter, its number of elements, and whether all addresses are multiples of 16.  Full
chunks of such tensors take a loop without masks, whose accesses are 16 bytes wide for float32 and
8 for 16-bit types; everything else takes the masked loop.

The arithmetic is that of :func:`megatron_s3.rules.s3.s3_update`.  It is launched with
``enable_fp_fusion=False``, so that for p = 1, 2, 3 the results are the same bits.
"""

import triton
import triton.language as tl

__all__ = ["BLOCK", "CHUNK", "NUM_WARPS", "ROW", "s3_kernel"]

#: Fields of a row of the table, int64 each (the last two are not used).
ROW = 8
NUM_WARPS = 8
#: Elements that a program works on at once: 4 a thread, 16 bytes of float32.
BLOCK = 128 * NUM_WARPS
#: Elements of a program.
CHUNK = 16 * BLOCK


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
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _power(x, p):
    return tl.exp2(p * tl.log2(x))


@triton.jit
def _s3_update(
    g,
    m,
    r,
    beta,
    one_minus_beta,
    beta_s,
    one_minus_beta_s,
    correction,
    bound,
    p,  # read where P is 0
    grad_bound,  # read where BOUNDED
    P: tl.constexpr,  # 1, 2 or 3; 0 for any other p
    NESTEROV: tl.constexpr,
    FORGETS: tl.constexpr,  # beta_s is 0
    BOUNDED: tl.constexpr,
):
    """New exp_avg, new exp_pnorm and u from the gradient and the state, all float32."""
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
    # Bits of what is not negative are ordered as the numbers are, NaN above all.
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
    u = tl.where(u > bound, bound, u)  # a NaN is not greater, and stays
    u = tl.where(u < -bound, -bound, u)
    return m, r, u


@triton.jit
def _counted(
    sum_update, max_update, sq_update, large, sq_param, sq_grad, zeros, nonfinite, u, g, x, is_zero
):
    """The statistics with one block more; see :mod:`megatron_s3.kernels.statistics`."""
    size = tl.abs(u)
    size = tl.where(size == size, size, 0.0)
    finite = tl.abs(g) < float("inf")
    wide = g.to(tl.float64)  # the square of 1e-23 or 2e19 is not a float32
    return (
        sum_update + size,
        tl.maximum(max_update, size),
        sq_update + size * size,
        large + (size > 0.9).to(tl.int32),
        sq_param + tl.where(x == x, x * x, 0.0),
        sq_grad + tl.where(finite, wide * wide, 0.0),
        zeros + is_zero.to(tl.int32),
        nonfinite + 1 - finite.to(tl.int32),
    )


@triton.jit
def s3_kernel(
    table,  # *int64: ROW fields a tensor
    chunks,  # *int32: 2 a program: row of the table, index of the chunk in the tensor
    rates,  # *float32: lr and 1 - lr * weight_decay, read where RATES_ON_DEVICE
    partials,  # *float64: 8 a program, written where STATISTICS
    lr,
    decay,
    beta,
    one_minus_beta,
    beta_s,
    one_minus_beta_s,
    correction,
    bound,
    p,
    grad_bound,
    GRAD: tl.constexpr,  # dtypes
    EXP_AVG: tl.constexpr,
    EXP_PNORM: tl.constexpr,
    MODEL: tl.constexpr,
    HAS_MODEL: tl.constexpr,
    P: tl.constexpr,
    NESTEROV: tl.constexpr,
    FORGETS: tl.constexpr,
    BOUNDED: tl.constexpr,
    RATES_ON_DEVICE: tl.constexpr,
    STATISTICS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one tensor."""
    program = tl.program_id(0)
    row = table + tl.load(chunks + 2 * program).to(tl.int64) * 8  # ROW
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    x_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    grad_ptr = tl.load(row + 1).to(tl.pointer_type(GRAD))
    avg_ptr = tl.load(row + 2).to(tl.pointer_type(EXP_AVG))
    norm_ptr = tl.load(row + 3).to(tl.pointer_type(EXP_PNORM))
    model_ptr = tl.load(row + 4).to(tl.pointer_type(MODEL))
    count = tl.load(row + 5)
    aligned = tl.load(row + 6)
    if RATES_ON_DEVICE:
        lr = tl.load(rates)
        decay = tl.load(rates + 1)

    if STATISTICS:
        sum_update = tl.full((BLOCK,), 0.0, tl.float32)
        max_update = tl.full((BLOCK,), 0.0, tl.float32)
        sq_update = tl.full((BLOCK,), 0.0, tl.float32)
        large = tl.full((BLOCK,), 0, tl.int32)
        sq_param = tl.full((BLOCK,), 0.0, tl.float32)
        sq_grad = tl.full((BLOCK,), 0.0, tl.float64)
        zeros = tl.full((BLOCK,), 0, tl.int32)
        nonfinite = tl.full((BLOCK,), 0, tl.int32)

    # A mask would keep loads and stores from being merged to wide ones.
    if (aligned != 0) & (begin + CHUNK <= count):
        x_ptr = tl.multiple_of(x_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        avg_ptr = tl.multiple_of(avg_ptr, 16)
        norm_ptr = tl.multiple_of(norm_ptr, 16)
        model_ptr = tl.multiple_of(model_ptr, 16)
        for k in range(0, CHUNK, BLOCK):
            at = begin + k + tl.arange(0, BLOCK)
            g = tl.load(grad_ptr + at).to(tl.float32)
            x = tl.load(x_ptr + at)
            m = tl.load(avg_ptr + at).to(tl.float32)
            r = tl.load(norm_ptr + at).to(tl.float32)
            m, r, u = _s3_update(
                *(g, m, r, beta, one_minus_beta, beta_s, one_minus_beta_s),
                *(correction, bound, p, grad_bound, P, NESTEROV, FORGETS, BOUNDED),
            )
            x = x * decay - lr * u
            tl.store(x_ptr + at, x)
            tl.store(avg_ptr + at, m.to(EXP_AVG))
            tl.store(norm_ptr + at, r.to(EXP_PNORM))
            if HAS_MODEL:
                tl.store(model_ptr + at, x.to(MODEL))
            if STATISTICS:
                sum_update, max_update, sq_update, large, sq_param, sq_grad, zeros, nonfinite = (
                    _counted(
                        *(sum_update, max_update, sq_update, large, sq_param, sq_grad),
                        *(zeros, nonfinite, u, g, x, g == 0),
                    )
                )
    else:
        for k in range(0, CHUNK, BLOCK):
            at = begin + k + tl.arange(0, BLOCK)
            inside = at < count
            g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
            m = tl.load(avg_ptr + at, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
            m, r, u = _s3_update(
                *(g, m, r, beta, one_minus_beta, beta_s, one_minus_beta_s),
                *(correction, bound, p, grad_bound, P, NESTEROV, FORGETS, BOUNDED),
            )
            x = x * decay - lr * u
            tl.store(x_ptr + at, x, mask=inside)
            tl.store(avg_ptr + at, m.to(EXP_AVG), mask=inside)
            tl.store(norm_ptr + at, r.to(EXP_PNORM), mask=inside)
            if HAS_MODEL:
                tl.store(model_ptr + at, x.to(MODEL), mask=inside)
            if STATISTICS:  # g, u and x are 0 outside
                sum_update, max_update, sq_update, large, sq_param, sq_grad, zeros, nonfinite = (
                    _counted(
                        *(sum_update, max_update, sq_update, large, sq_param, sq_grad),
                        *(zeros, nonfinite, u, g, x, (g == 0) & inside),
                    )
                )

    if STATISTICS:
        out = partials + program * 8
        tl.store(out, tl.reduce(sum_update, 0, _add))
        tl.store(out + 1, tl.reduce(max_update, 0, _larger))
        tl.store(out + 2, tl.reduce(sq_update, 0, _add))
        tl.store(out + 3, tl.reduce(large, 0, _add))
        tl.store(out + 4, tl.reduce(sq_param, 0, _add))
        tl.store(out + 5, tl.reduce(sq_grad, 0, _add))
        tl.store(out + 6, tl.reduce(zeros, 0, _add))
        tl.store(out + 7, tl.reduce(nonfinite, 0, _add))
