"""Detection of tensors that share memory, whose updates must keep their order.

A kernel updates many parameters at once.  Where two of them share memory, or one is listed twice,
the result would depend on which thread is first; torch's optimizers update them in order.
"""

from bisect import bisect_left
from collections.abc import Sequence
from operator import itemgetter

from torch import Tensor

from megatron_s3.kernels.operands import Operands, size_of

__all__ = ["Overlaps"]

#: What :func:`megatron_s3.kernels.operands.flatten` returns.
Flat = tuple[Operands, list[tuple[Tensor, Tensor]]]
#: First address, address after the last one, index of the parameter.
_Span = tuple[int, int, int]
_copies = itemgetter(1)


class Overlaps:
    """A search for overlaps, which remembers disjoint memory: it seldom moves between steps."""

    def __init__(self) -> None:
        self._last: list[tuple[int, ...]] = []
        self._last_read: list[tuple[int, ...]] = []
        self._apart: dict[tuple[int, ...], None] = {}
        self._starts: list[int] = []
        self._ends: list[int] = []

    def cuts(self, flat: Sequence[Flat]) -> list[int]:
        """Returns where to cut a step so that no two updates within a piece depend on each other.

        Args:
            flat: all operands of a step, in the order in which torch would update them.

        Returns:
            The indices in ``flat`` at which a new piece begins, ascending; empty if nothing
            overlaps.
        """
        if any(map(_copies, flat)):
            return _cuts(flat)
        written = [o.written for o, _ in flat]
        known = written == self._last
        if not known and not self._are_apart(written) and not self._learn(written):
            return _cuts(flat)
        read = [o.read for o, _ in flat]
        if known and read == self._last_read:
            return []
        self._last, self._last_read = written, []
        starts, ends = self._starts, self._ends
        for (address, code), places in zip(read, written, strict=True):
            # A gradient must lie before or after everything that is written.
            end = address + places[0] * size_of(code)
            at = bisect_left(starts, end) - 1
            if at >= 0 and ends[at] > address:
                return _cuts(flat)
        self._last_read = read
        return []

    def _are_apart(self, written: list[tuple[int, ...]]) -> bool:
        return self._apart.keys() >= set(written) and len(set(written)) == len(written)

    def _learn(self, written: list[tuple[int, ...]]) -> bool:
        """Returns whether all of these are disjoint, and remembers it.

        Memory that was known to be disjoint stays known where possible: parameters without a
        gradient are absent from one step and return in another.
        """
        if len(self._apart) < 4 * len(written):
            together = [*(self._apart.keys() - set(written)), *written]
            if self._set_apart(together):
                return True
        return self._set_apart(written)

    def _set_apart(self, written: list[tuple[int, ...]]) -> bool:
        spans = sorted(span for i, places in enumerate(written) for span in _spans(places, i))
        starts, ends = [span[0] for span in spans], [span[1] for span in spans]
        if any(end > start for end, start in zip(ends, starts[1:], strict=False)):
            return False
        self._starts, self._ends = starts, ends
        self._apart = dict.fromkeys(written)
        return True


def _spans(places: tuple[int, ...], index: int) -> list[_Span]:
    count = places[0]
    if not count:
        return []
    pairs = zip(places[1::2], places[2::2], strict=True)
    return [(a, a + count * size_of(code), index) for a, code in pairs if a]


def _span(tensor: Tensor, index: int) -> list[_Span]:
    """Returns the span from the first to the last element of a tensor in any layout."""
    if not tensor.numel() or not (address := tensor.data_ptr()):
        return []
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return [(address, address + (last + 1) * tensor.element_size(), index)]


def _cuts(flat: Sequence[Flat]) -> list[int]:
    """Returns the same as :meth:`Overlaps.cuts`, by comparing all memory."""
    spans: list[tuple[_Span, bool]] = []
    for i, (o, copies) in enumerate(flat):
        spans += ((span, True) for span in _spans(o.written, i))
        spans += ((span, True) for _, tensor in copies for span in _span(tensor, i))
        spans += ((span, False) for span in _spans((o.written[0], *o.read), i))
    spans.sort()
    before = [-1] * len(flat)  # for each parameter, the last one before it that it must wait for
    open_: list[tuple[_Span, bool]] = []
    for span, writes in spans:
        open_ = [other for other in open_ if other[0][1] > span[0]]
        for other, also in open_:
            one, two = sorted((other[2], span[2]))
            if one != two and (writes or also):
                before[two] = max(before[two], one)
        open_.append((span, writes))
    cuts, begin = [], 0
    for i, last in enumerate(before):
        if last >= begin:
            cuts.append(i)
            begin = i
    return cuts
