"""The fused step as a Triton kernel: one program a chunk, one launch for all tensors of a group.

A row of the table describes one tensor: the addresses of parameter, gradient and model parameter,
its number of elements, whether all addresses are multiples of 16, and the addresses of the states.
Full chunks of aligned tensors run in a loop without masks, whose accesses are 16 bytes wide for
float32 and 8 for 16-bit types; all others run in the masked loop.

The rule is one of :mod:`megatron_s3.kernels.gpu.rules`.  The kernel is launched with
``enable_fp_fusion=False``, so that the results have the bits of the PyTorch implementation.
"""

# ruff: noqa: RUF005 (Triton adds tuples, and does not unpack into them)
import triton
import triton.language as tl

__all__ = ["BLOCK", "CHUNK", "NUM_WARPS", "ROW", "step_kernel"]

#: Fields of a row of the table, int64 each: the first five, and at most four states.
ROW = 9
NUM_WARPS = 8
#: Elements that a program updates at once: 4 per thread, 16 bytes of float32.
BLOCK = 128 * NUM_WARPS
#: Elements that a program updates.
CHUNK = 16 * BLOCK


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _load(pointer, at, count, MASKED: tl.constexpr):
    values = tl.load(pointer + at, mask=at < count, other=0.0) if MASKED else tl.load(pointer + at)
    return values.to(tl.float32)


@triton.jit
def _store(pointer, at, values, count, MASKED: tl.constexpr):
    values = values.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + at, values, mask=at < count)
    else:
        tl.store(pointer + at, values)


@triton.jit
def _block(
    x_ptr,
    grad_ptr,
    model_ptr,
    state_ptrs,
    at,
    count,
    lr,
    decay,
    scalars,
    RULE: tl.constexpr,
    VARIANT: tl.constexpr,
    STATES: tl.constexpr,
    HAS_MODEL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Updates a block; returns update, gradient and new parameter, 0 outside of the tensor."""
    g = _load(grad_ptr, at, count, MASKED)
    x = _load(x_ptr, at, count, MASKED)
    states = ()
    for i in tl.static_range(STATES):
        states = states + (_load(state_ptrs[i], at, count, MASKED),)
    u, states = RULE(g, states, scalars, VARIANT)
    x = x * decay - lr * u
    _store(x_ptr, at, x, count, MASKED)
    for i in tl.static_range(STATES):
        _store(state_ptrs[i], at, states[i], count, MASKED)
    if HAS_MODEL:
        _store(model_ptr, at, x, count, MASKED)
    return u, g, x


@triton.jit
def _counted(
    sum_update, max_update, sq_update, large, sq_param, sq_grad, zeros, nonfinite, u, g, x, is_zero
):
    """Returns the statistics with a block added; see :mod:`megatron_s3.kernels.statistics`."""
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
def step_kernel(
    table,  # *int64: ROW fields a tensor
    chunks,  # *int32: 2 a program: row of the table, index of the chunk in the tensor
    rates,  # *float32: lr and 1 - lr * weight_decay, read where RATES_ON_DEVICE
    partials,  # *float64: 8 a program, written where STATISTICS
    lr,
    decay,
    scalars,  # a tuple: the rule's
    RULE: tl.constexpr,
    VARIANT: tl.constexpr,
    STATES: tl.constexpr,  # their number
    BF16: tl.constexpr,  # bit i: state i is bfloat16, and not float32
    PARAM: tl.constexpr,  # dtypes
    GRAD: tl.constexpr,
    MODEL: tl.constexpr,
    HAS_MODEL: tl.constexpr,
    RATES_ON_DEVICE: tl.constexpr,
    STATISTICS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates one chunk of one tensor."""
    program = tl.program_id(0)
    row = table + tl.load(chunks + 2 * program).to(tl.int64) * 9  # ROW
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    x_ptr = tl.load(row).to(tl.pointer_type(PARAM))
    grad_ptr = tl.load(row + 1).to(tl.pointer_type(GRAD))
    model_ptr = tl.load(row + 2).to(tl.pointer_type(MODEL))
    count = tl.load(row + 3)
    aligned = tl.load(row + 4)
    state_ptrs = ()
    for i in tl.static_range(STATES):
        if (BF16 >> i) & 1:
            state_ptr = tl.load(row + 5 + i).to(tl.pointer_type(tl.bfloat16))
        else:
            state_ptr = tl.load(row + 5 + i).to(tl.pointer_type(tl.float32))
        state_ptrs = state_ptrs + (state_ptr,)
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

    # A mask would prevent loads and stores from being merged into wide ones.
    if (aligned != 0) & (begin + CHUNK <= count):
        x_ptr = tl.multiple_of(x_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        model_ptr = tl.multiple_of(model_ptr, 16)
        wide_ptrs = ()
        for i in tl.static_range(STATES):
            wide_ptrs = wide_ptrs + (tl.multiple_of(state_ptrs[i], 16),)
        for k in range(0, CHUNK, BLOCK):
            at = begin + k + tl.arange(0, BLOCK)
            u, g, x = _block(
                *(x_ptr, grad_ptr, model_ptr, wide_ptrs, at, count, lr, decay, scalars),
                *(RULE, VARIANT, STATES, HAS_MODEL, False),
            )
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
            u, g, x = _block(
                *(x_ptr, grad_ptr, model_ptr, state_ptrs, at, count, lr, decay, scalars),
                *(RULE, VARIANT, STATES, HAS_MODEL, True),
            )
            if STATISTICS:  # g, u and x are 0 outside
                sum_update, max_update, sq_update, large, sq_param, sq_grad, zeros, nonfinite = (
                    _counted(
                        *(sum_update, max_update, sq_update, large, sq_param, sq_grad),
                        *(zeros, nonfinite, u, g, x, (g == 0) & (at < count)),
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
