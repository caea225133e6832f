"""State and main parameters in fewer bytes, with torch operations.

**A fraction.**  A state in int8 holds whole numbers ``c`` in [-127, 127] for the values ``c / 127``
times the state after it.  This needs ``|m| <= r``, which S3's states keep in every step
(Theorem 2), and then covers all magnitudes without a scale.  A step rounds stochastically: rounding
to nearest would undo the decay of ``m`` in an element without gradients, while ``r`` shrinks, and
the parameter would go on moving.  The noise is a hash of the bits of the gradient and of the new
``r``, and of the number of the step, so it is the same however a parameter is sharded.

**A remainder.**  A main parameter in int16 holds what the model's bfloat16 parameter lacks of
float32: the bits of the float32 number are those of the bfloat16 number followed by 16 zeros, plus
the remainder (as in Transformer Engine's ``store_param_remainders``).  The bfloat16 number is
therefore rounded half away from zero, and not half to even.

**Denormal numbers.**  A state in bfloat16 has none: numbers below the smallest normal one become 0.
Rounding to nearest would stop the decay of ``m`` there, while ``r`` shrinks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "FRACTION",
    "REMAINDER",
    "join",
    "nearest_fractions",
    "read_states",
    "split",
    "values_of_fractions",
    "write_states",
]

#: The dtype of a state that holds fractions of the state after it.
FRACTION = torch.int8
#: The dtype of a main parameter that holds remainders of the model's bfloat16 parameter.
REMAINDER = torch.int16

_LARGEST = 127
_TINY = torch.finfo(torch.float32).tiny


def values_of_fractions(codes: Tensor, whole: Tensor) -> Tensor:
    """Returns the values of a state that holds fractions: float32, NaN where ``whole`` is NaN.

    Args:
        codes: int8, any shape.
        whole: the state of which they are fractions; the same shape, any floating dtype.
    """
    # The product with the rounded 1/127 is at most 1.
    return (codes.float() * (1 / _LARGEST)).mul_(whole)


def nearest_fractions(values: Tensor, whole: Tensor) -> Tensor:
    """Returns the nearest fractions, int8: the inverse of :func:`values_of_fractions`.

    It also restores the codes from values that were rounded to bfloat16.  It serves to load a
    state; a step rounds stochastically.

    Args:
        values: the state's values, any floating dtype.
        whole: the state of which they become fractions, as it is stored.
    """
    return _codes(_scaled(values.float(), whole.float()).round_())


def read_states(states: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns states as numbers to compute with: the tensors themselves if they have that dtype.

    Args:
        states: the states in the rule's order; one in int8 is followed by a floating one.
        dtype: float32 or float64.
    """
    found: list[Tensor] = []
    for state in reversed(states):
        if state.dtype == FRACTION:
            found.append(values_of_fractions(state, found[-1]))
        else:
            found.append(state.to(dtype))
    return found[::-1]


def write_states(states: Sequence[Tensor], new: Sequence[Tensor], grad: Tensor, seed: int) -> None:
    """Stores new states, rounded to the dtypes of the old ones.

    Args:
        states: the stored states, as for :func:`read_states`.
        new: their new values; those that are the stored tensors themselves are left alone.
        grad: the gradient of the step, float32.
        seed: the number of the step, which the noise depends on.
    """
    for i in reversed(range(len(states))):
        state, values = states[i], new[i]
        if state.dtype == FRACTION:
            noise = _noise(grad, new[i + 1], seed)
            scaled = _scaled(values, states[i + 1].to(values.dtype))
            state.copy_(_codes(scaled.add_(noise).floor_()))
        elif state.dtype == torch.bfloat16:
            state.copy_(values.masked_fill(values.abs() < _TINY, 0))
        elif state is not values:
            state.copy_(values)


def _scaled(values: Tensor, whole: Tensor) -> Tensor:
    """Returns 127 times the quotient, limited to 127 in magnitude; 0 where ``whole`` is 0."""
    scaled = (values / whole).mul_(_LARGEST).clamp_(-_LARGEST, _LARGEST)
    return scaled.masked_fill_(whole == 0, 0)


def _codes(whole_numbers: Tensor) -> Tensor:
    return whole_numbers.nan_to_num_(nan=0.0).to(FRACTION)


def _noise(grad: Tensor, whole: Tensor, seed: int) -> Tensor:
    """Returns odd multiples of 2**-17 in (0, 1), whose mean is a half.

    The largest one and 127 have a sum below 128 in float32.
    """
    h = _bits(grad).mul(_signed(0x9E3779B1)).bitwise_xor_(_bits(whole).mul(_signed(0x85EBCA6B)))
    h.bitwise_xor_(_signed(seed % (1 << 24) * 0xC2B2AE35))
    for shift, factor in ((15, 0x7FEB352D), (15, 0x846CA68B)):
        h.bitwise_xor_(_shifted(h, shift)).mul_(_signed(factor))
    h.bitwise_xor_(_shifted(h, 16))
    return _shifted(h, 16).float().add_(0.5).mul_(2.0**-16)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _signed(number: int) -> int:
    """Returns the signed 32-bit integer with the lowest 32 bits of a number."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def _shifted(h: Tensor, by: int) -> Tensor:
    """Returns the bits moved to the right, filled with zeros."""
    return (h >> by).bitwise_and_((1 << (32 - by)) - 1)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Returns the float32 numbers of bfloat16 parameters and their remainders.

    Args:
        high: bfloat16, any shape.
        low: int16, the same shape.
    """
    bits = high.view(torch.int16).to(torch.int32).mul_(1 << 16).add_(low)
    return bits.view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns bfloat16 numbers and int16 remainders: the inverse of :func:`join`.

    A NaN stays a NaN, whose lower bits are lost.

    Args:
        x: float32, any shape.
    """
    bits = x.view(torch.int32)
    is_nan = x.isnan()
    # A sum above the largest int32 is a NaN's, whose result is not used.
    high = torch.where(is_nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    low = torch.where(is_nan, 0, bits & 0xFFFF)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)
