"""Spike scores of other projects: the losses that a running mean and standard deviation flag.

OLMo-core's monitor flags losses 6 standard deviations above the mean of the last 128 losses, OLMo
2's score 7 above that of the last 1,000 (arXiv:2501.00656).
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator

__all__ = ["OLMO2", "OLMO_CORE", "deviations"]

#: Number of losses, and of standard deviations.
OLMO_CORE, OLMO2 = (128, 6), (1000, 7)


def deviations(losses: Iterable[float], window: int, limit: float) -> Iterator[bool]:
    """Yields for every loss whether it is too high, or not finite.

    Args:
        losses: losses in order.
        window: the number of finite losses before it with which a loss is compared; from the 32nd
            on, fewer are enough.
        limit: the standard deviations above their mean at which a loss is too high.
    """
    seen: deque[float] = deque(maxlen=window)
    total = square = 0.0
    for loss in losses:
        n = len(seen)
        if not math.isfinite(loss):
            yield True
            continue
        spread = math.sqrt(max(0.0, square / n - (total / n) ** 2)) if n >= 32 else math.inf
        yield n >= 32 and loss > total / n + limit * spread
        if n == window:
            total, square = total - seen[0], square - seen[0] ** 2
        seen.append(loss)
        total, square = total + loss, square + loss**2
