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
from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from megatron_s3.kernels.compact import FRACTION
from megatron_s3.kernels.gpu.rules import small
from megatron_s3.rules.kernel_form import Form

__all__ = [
    "BLOCK",
    "CHUNK",
    "NUM_WARPS",
    "REGISTERS",
    "ROW",
    "STORED",
    "launch_options",
    "step_kernel",
    "stored",
]

#: Fields of a row of the table, int64 each: the first six, and at most four states.
ROW = 10
#: Numbers of the dtypes in which a state may be stored.
STORED: dict[torch.dtype | None, int] = {torch.float32: 0, torch.bfloat16: 1, FRACTION: 2}
_BF16 = tl.constexpr(STORED[torch.bfloat16])
_FRACTION = tl.constexpr(STORED[FRACTION])
NUM_WARPS = 8
#: Elements that a program updates at once: 4 per thread, 16 bytes of float32.
BLOCK = 128 * NUM_WARPS
#: Elements that a program updates.
CHUNK = 16 * BLOCK
#: Rounds of the loop without masks whose loads are under way at once, where statistics are counted.
STAGES = tl.constexpr(3)
#: Registers of a thread with which a multiprocessor holds three programs at once, and not two.
REGISTERS = 80


def launch_options(
    form: Form, *, statistics: bool, fractions: bool = False
) -> dict[str, int | bool]:
    """Returns the options with which the kernel is compiled for a form.

    Args:
        form: the rule and its numbers.
        statistics: whether the kernel counts statistics; where the code of the rule then fits into
            :data:`REGISTERS` without spills, the compiler is held to them.
        fractions: whether a state holds fractions, which are stored with a division.
    """
    options: dict[str, int | bool] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    if statistics and small(form) and not fractions:
        options["maxnreg"] = REGISTERS
    return options


def stored(dtypes: Iterable[torch.dtype | None]) -> int:
    """Returns the kernel's ``STORED``: two bits for each state, its number in :data:`STORED`."""
    return sum(STORED[dtype] << 2 * i for i, dtype in enumerate(dtypes))


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
def _read(pointer, at, count, MASKED: tl.constexpr):
    return tl.load(pointer + at, mask=at < count, other=0) if MASKED else tl.load(pointer + at)


@triton.jit
def _load(pointer, at, count, MASKED: tl.constexpr):
    return _read(pointer, at, count, MASKED).to(tl.float32)


@triton.jit
def _store(pointer, at, values, count, MASKED: tl.constexpr):
    values = values.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + at, values, mask=at < count)
    else:
        tl.store(pointer + at, values)


@triton.jit
def _joined(high, low):
    """Returns float32 numbers of bfloat16 ones and remainders; see kernels/compact.py."""
    bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (bits + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _split(x):
    """Returns bfloat16 numbers and their remainders."""
    bits = x.to(tl.int32, bitcast=True)
    number = x == x
    high = tl.where(number, (bits + 0x8000) >> 16, (bits >> 16) | 0x40)
    low = tl.where(number, bits & 0xFFFF, 0)
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), low.to(tl.int16)


@triton.jit
def _mixed(h, SHIFT: tl.constexpr, FACTOR: tl.constexpr):
    factor = tl.full(h.shape, FACTOR, tl.uint32)
    return (h ^ (h >> SHIFT)) * factor


@triton.jit
def _noise(g, whole, seed):
    """Returns odd multiples of 2**-17 in (0, 1); see kernels/compact.py."""
    h = g.to(tl.uint32, bitcast=True) * tl.full(g.shape, 0x9E3779B1, tl.uint32)
    h = h ^ (whole.to(tl.uint32, bitcast=True) * tl.full(g.shape, 0x85EBCA6B, tl.uint32))
    h = h ^ (seed.to(tl.int32).to(tl.uint32) * tl.full((1,), 0xC2B2AE35, tl.uint32))
    h = _mixed(_mixed(h, 15, 0x7FEB352D), 15, 0x846CA68B)
    h = (h ^ (h >> 16)) >> 16
    return (h.to(tl.int32).to(tl.float32) + 0.5) * 0.0000152587890625


@triton.jit
def _fractions(values, whole, noise):
    """Returns fractions in int8, rounded stochastically; see kernels/compact.py."""
    # Triton 3.3 divides with denormal numbers taken for 0; the scale is a power of two.
    scale = tl.where(whole < 7.888609052210118e-31, 16777216.0, 1.0)
    x = tl.div_rn(values * scale, whole * scale) * 127.0
    x = tl.where((x == x) & (whole != 0.0), x, 0.0)
    x = tl.minimum(tl.maximum(x, -127.0), 127.0) + noise  # below 128
    down = x.to(tl.int32)
    down = down - (down.to(tl.float32) > x).to(tl.int32)
    return down.to(tl.int8)


@triton.jit
def _stored(values, KIND: tl.constexpr):
    """Returns a state as it is read after it was stored."""
    if KIND == _BF16:
        denormal = tl.abs(values) < 1.1754943508222875e-38
        values = tl.where(denormal, 0.0, values).to(tl.bfloat16).to(tl.float32)
    return values


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
    seed,
    scalars,
    RULE: tl.constexpr,
    VARIANT: tl.constexpr,
    STATES: tl.constexpr,
    STORED: tl.constexpr,
    HAS_MODEL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Updates a block; returns update, gradient and new parameter, 0 outside of the tensor."""
    REMAINDERS: tl.constexpr = x_ptr.dtype.element_ty == tl.int16
    g = _load(grad_ptr, at, count, MASKED)
    if REMAINDERS:
        x = _joined(_read(model_ptr, at, count, MASKED), _read(x_ptr, at, count, MASKED))
    else:
        x = _load(x_ptr, at, count, MASKED)
    loaded = ()
    for i in tl.static_range(STATES):
        loaded = loaded + (_load(state_ptrs[i], at, count, MASKED),)
    states = ()
    for i in tl.static_range(STATES):
        if (STORED >> 2 * i) & 3 == _FRACTION:
            states = states + (loaded[i] * 0.007874015748031496 * loaded[i + 1],)
        else:
            states = states + (loaded[i],)
    u, states = RULE(g, states, scalars, VARIANT)
    x = x * decay - lr * u
    if REMAINDERS:
        high, low = _split(x)
        _store(model_ptr, at, high, count, MASKED)
        _store(x_ptr, at, low, count, MASKED)
    else:
        _store(x_ptr, at, x, count, MASKED)
    for i in tl.static_range(STATES):
        if (STORED >> 2 * i) & 3 == _FRACTION:
            whole = _stored(states[i + 1], (STORED >> 2 * i + 2) & 3)
            codes = _fractions(states[i], whole, _noise(g, states[i + 1], seed))
            _store(state_ptrs[i], at, codes, count, MASKED)
        else:
            _store(state_ptrs[i], at, _stored(states[i], (STORED >> 2 * i) & 3), count, MASKED)
    if HAS_MODEL and not REMAINDERS:
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
def _rates(
    rates,
    host_rates,
    group,
    GROUPS: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    SEEDED: tl.constexpr,
):
    """Returns a group's lr, decay and seed (0 if there is none); arguments of the kernel."""
    WIDTH: tl.constexpr = 3 if SEEDED else 2
    seed = 0.0
    if ON_DEVICE:
        lr = tl.load(rates + 3 * group)
        decay = tl.load(rates + 3 * group + 1)
        if SEEDED:
            seed = tl.load(rates + 3 * group + 2)
    else:
        lr = host_rates[0]
        decay = host_rates[1]
        if SEEDED:
            seed = host_rates[2]
        for i in tl.static_range(1, GROUPS):
            lr = tl.where(group == i, host_rates[WIDTH * i], lr)
            decay = tl.where(group == i, host_rates[WIDTH * i + 1], decay)
            if SEEDED:
                seed = tl.where(group == i, host_rates[WIDTH * i + 2], seed)
    return lr, decay, seed


@triton.jit
def step_kernel(
    table,  # *int64: ROW fields a tensor
    chunks,  # *int32: 2 a program: row of the table, index of the chunk in the tensor
    rates,  # *float32: lr, 1 - lr * weight_decay and seed of each group; see RATES_ON_DEVICE
    partials,  # *float64: 8 a program, written where STATISTICS
    host_rates,  # a tuple: the same numbers, read elsewhere; without seeds if no state needs them
    scalars,  # a tuple: the rule's
    GROUPS: tl.constexpr,  # their number
    RULE: tl.constexpr,
    VARIANT: tl.constexpr,
    STATES: tl.constexpr,  # their number
    STORED: tl.constexpr,  # see the function stored
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
        if (STORED >> 2 * i) & 3 == _BF16:
            state_ptr = tl.load(row + 6 + i).to(tl.pointer_type(tl.bfloat16))
        elif (STORED >> 2 * i) & 3 == _FRACTION:
            state_ptr = tl.load(row + 6 + i).to(tl.pointer_type(tl.int8))
        else:
            state_ptr = tl.load(row + 6 + i).to(tl.pointer_type(tl.float32))
        state_ptrs = state_ptrs + (state_ptr,)
    group = tl.load(row + 5) if GROUPS > 1 else 0
    lr, decay, seed = _rates(
        rates, host_rates, group, GROUPS, RATES_ON_DEVICE, (STORED & 0xAA) != 0
    )

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
                *(x_ptr, grad_ptr, model_ptr, wide_ptrs, at, count, lr, decay, seed, scalars),
                *(RULE, VARIANT, STATES, STORED, HAS_MODEL, False),
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
                *(x_ptr, grad_ptr, model_ptr, state_ptrs, at, count, lr, decay, seed, scalars),
                *(RULE, VARIANT, STATES, STORED, HAS_MODEL, True),
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
