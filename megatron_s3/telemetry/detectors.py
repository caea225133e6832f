"""Detectors that flag the losses of a spike: the package's own, and three of other projects.

OLMo-core's monitor flags losses 6 standard deviations above the mean of the last 128 losses; OLMo
2's score uses 7 standard deviations and the last 1,000 losses (arXiv:2501.00656); Megatron-LM
(megatron/core/rerun_state_machine.py) flags losses above 10 times the largest of the first 100.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator

from megatron_s3.telemetry.spikes import SpikeDetector

__all__ = ["DETECTORS"]


def _ours(losses: list[float]) -> Iterator[bool]:
    detector = SpikeDetector()
    for i, loss in enumerate(losses):
        detector.add(i, loss)
        yield detector.open is not None


def _deviations(window: int, limit: float) -> Callable[[list[float]], Iterator[bool]]:
    def flags(losses: list[float]) -> Iterator[bool]:
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

    return flags


def _largest(losses: list[float]) -> Iterator[bool]:
    limit = 10 * max(losses[:100])
    return (i >= 100 and loss > limit for i, loss in enumerate(losses))


#: Detectors by name: each yields, for every loss, whether it belongs to a spike.
DETECTORS: dict[str, Callable[[list[float]], Iterator[bool]]] = {
    "megatron_s3": _ours,
    "mean + 6 sigma of 128 (OLMo-core)": _deviations(128, 6),
    "mean + 7 sigma of 1,000 (OLMo 2)": _deviations(1000, 7),
    "10 x largest of first 100 (Megatron-LM)": _largest,
}
