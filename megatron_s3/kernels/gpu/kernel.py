"""The fused step as a Triton kernel: one program a chunk, one launch for all tensors of a rule.

A row of the table describes one tensor: the addresses of parameter, gradient and model parameter,
its number of elements, whether all addresses are multiples of 16, the index of its param group
among those of the launch, and the addresses of the states.
Full chunks of aligned tensors run in a loop without masks, whose accesses are 16 bytes wide for
float32 and 8 for 16-bit types; all others run in the masked loop.

The rule is one of :mod:`megatron_s3.kernels.gpu.rules`.  The kernel is launched with
``enable_fp_fusion=False``, so that the results have the bits of the PyTorch implementation.

Statistics are kept for a thread and not for each of its four elements, and their loop copies what
it loads ahead of time into shared memory: both save registers, of which more threads then have
enough at once.
"""

# ruff: noqa: RUF005 (Triton adds tuples, and does not unpack into them)
import triton
import triton.language as tl

from megatron_s3.kernels.gpu.rules import small
from megatron_s3.rules.kernel_form import Form

__all__ = ["BLOCK", "CHUNK", "NUM_WARPS", "REGISTERS", "ROW", "launch_options", "step_kernel"]

#: Fields of a row of the table, int64 each: the first six, and at most four states.
ROW = 10
NUM_WARPS = 8
#: Elements that a program updates at once: 4 per thread, 16 bytes of float32.
BLOCK = 128 * NUM_WARPS
#: Elements that a program updates.
CHUNK = 16 * BLOCK
#: Rounds of the loop without masks whose loads are under way at once, where statistics are counted.
STAGES = tl.constexpr(3)
#: Registers of a thread with which a multiprocessor holds three programs at once, and not two.
REGISTERS = 80


def launch_options(form: Form, *, statistics: bool) -> dict[str, int | bool]:
    """Returns the options with which the kernel is compiled for a form.

    Args:
        form: the rule and its numbers.
        statistics: whether the kernel counts statistics; where the code of the rule then fits into
            :data:`REGISTERS` without spills, the compiler is held to them.
    """
    options: dict[str, int | bool] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    if statistics and small(form):
        options["maxnreg"] = REGISTERS
    return options


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _halves(x):
    """Returns the elements of even and of odd index, which lie in the same thread."""
    return tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))


@triton.jit
def _four(x):
    """Returns the sum of every four elements, which one thread holds."""
    even, odd = _halves(x)
    even, odd = _halves(even + odd)
    return even + odd


@triton.jit
def _largest_of_four(x):
    even, odd = _halves(x)
    even, odd = _halves(tl.maximum(even, odd))
    return tl.maximum(even, odd)


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
def _counted(sum_update, max_update, sq_update, sq_param, sq_grad, counts, u, g, x, is_zero):
    """Returns the statistics with a block added; see :mod:`megatron_s3.kernels.statistics`."""
    size = tl.abs(u)
    size = tl.where(size == size, size, 0.0)
    finite = tl.abs(g) < float("inf")
    wide = g.to(tl.float64)  # the square of 1e-23 or 2e19 is not a float32
    found = (size > 0.9).to(tl.int32) | (is_zero.to(tl.int32) << 10)
    found = found | ((1 - finite.to(tl.int32)) << 20)
    return (
        sum_update + _four(size),
        tl.maximum(max_update, _largest_of_four(size)),
        sq_update + _four(size * size),
        sq_param + _four(tl.where(x == x, x * x, 0.0)),
        sq_grad + _four(tl.where(finite, wide * wide, 0.0)),
        counts + _four(found),
    )


@triton.jit
def step_kernel(
    table,  # *int64: ROW fields a tensor
    chunks,  # *int32: 2 a program: row of the table, index of the chunk in the tensor
    rates,  # *float32: lr and 1 - lr * weight_decay of each group, read where RATES_ON_DEVICE
    partials,  # *float64: 8 a program, written where STATISTICS
    host_rates,  # a tuple: the same numbers, read elsewhere
    scalars,  # a tuple: the rule's
    GROUPS: tl.constexpr,  # their number
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
    row = table + tl.load(chunks + 2 * program).to(tl.int64) * 10  # ROW
    begin = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    x_ptr = tl.load(row).to(tl.pointer_type(PARAM))
    grad_ptr = tl.load(row + 1).to(tl.pointer_type(GRAD))
    model_ptr = tl.load(row + 2).to(tl.pointer_type(MODEL))
    count = tl.load(row + 3)
    aligned = tl.load(row + 4)
    state_ptrs = ()
    for i in tl.static_range(STATES):
        if (BF16 >> i) & 1:
            state_ptr = tl.load(row + 6 + i).to(tl.pointer_type(tl.bfloat16))
        else:
            state_ptr = tl.load(row + 6 + i).to(tl.pointer_type(tl.float32))
        state_ptrs = state_ptrs + (state_ptr,)
    group = tl.load(row + 5) if GROUPS > 1 else 0
    if RATES_ON_DEVICE:
        lr = tl.load(rates + 2 * group)
        decay = tl.load(rates + 2 * group + 1)
    else:
        lr = host_rates[0]
        decay = host_rates[1]
        for i in tl.static_range(1, GROUPS):
            lr = tl.where(group == i, host_rates[2 * i], lr)
            decay = tl.where(group == i, host_rates[2 * i + 1], decay)

    if STATISTICS:
        sum_update = tl.full((BLOCK // 4,), 0.0, tl.float32)
        max_update = tl.full((BLOCK // 4,), 0.0, tl.float32)
        sq_update = tl.full((BLOCK // 4,), 0.0, tl.float32)
        sq_param = tl.full((BLOCK // 4,), 0.0, tl.float32)
        sq_grad = tl.full((BLOCK // 4,), 0.0, tl.float64)
        # Large updates, zeros and gradients that are not finite: 10 bits each, since a thread
        # updates CHUNK / BLOCK * 4 = 64 elements.
        counts = tl.full((BLOCK // 4,), 0, tl.int32)

    # A mask would prevent loads and stores from being merged into wide ones.
    if (aligned != 0) & (begin + CHUNK <= count):
        x_ptr = tl.multiple_of(x_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        model_ptr = tl.multiple_of(model_ptr, 16)
        wide_ptrs = ()
        for i in tl.static_range(STATES):
            wide_ptrs = wide_ptrs + (tl.multiple_of(state_ptrs[i], 16),)
        for k in tl.range(0, CHUNK, BLOCK, num_stages=STAGES if STATISTICS else 1):
            at = begin + k + tl.arange(0, BLOCK)
            u, g, x = _block(
                *(x_ptr, grad_ptr, model_ptr, wide_ptrs, at, count, lr, decay, scalars),
                *(RULE, VARIANT, STATES, HAS_MODEL, False),
            )
            if STATISTICS:
                sum_update, max_update, sq_update, sq_param, sq_grad, counts = _counted(
                    *(sum_update, max_update, sq_update, sq_param, sq_grad, counts),
                    *(u, g, x, g == 0),
                )
    else:
        for k in range(0, CHUNK, BLOCK):
            at = begin + k + tl.arange(0, BLOCK)
            u, g, x = _block(
                *(x_ptr, grad_ptr, model_ptr, state_ptrs, at, count, lr, decay, scalars),
                *(RULE, VARIANT, STATES, HAS_MODEL, True),
            )
            if STATISTICS:  # g, u and x are 0 outside
                sum_update, max_update, sq_update, sq_param, sq_grad, counts = _counted(
                    *(sum_update, max_update, sq_update, sq_param, sq_grad, counts),
                    *(u, g, x, (g == 0) & (at < count)),
                )

    if STATISTICS:
        out = partials + program * 8
        tl.store(out, tl.reduce(sum_update, 0, _add))
        tl.store(out + 1, tl.reduce(max_update, 0, _larger))
        tl.store(out + 2, tl.reduce(sq_update, 0, _add))
        tl.store(out + 3, tl.reduce(counts & 0x3FF, 0, _add))
        tl.store(out + 4, tl.reduce(sq_param, 0, _add))
        tl.store(out + 5, tl.reduce(sq_grad, 0, _add))
        tl.store(out + 6, tl.reduce((counts >> 10) & 0x3FF, 0, _add))
        tl.store(out + 7, tl.reduce(counts >> 20, 0, _add))
