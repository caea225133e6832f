"""A run's loss spikes, and what rose before each."""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_s3.telemetry.spikes import SpikeDetector
from megatron_s3.telemetry.updates import rising, sizes

__all__ = ["SpikeLog"]

#: Intervals against which a rise of the updates is measured.
REMEMBERED = 64


class SpikeLog:
    """A :class:`~megatron_s3.telemetry.spikes.SpikeDetector` that is shown a run's intervals.

    Attributes:
        detector: of the losses.
    """

    def __init__(self) -> None:
        self.detector = SpikeDetector()
        #: Mean |u| of the last intervals without a spike.
        self._sizes: deque[dict[str, dict[str, float]]] = deque(maxlen=REMEMBERED)
        #: What rose before the last spike.
        self._first: list[str] = []

    @property
    def count(self) -> int:
        """Spikes so far, one under way among them."""
        return len(self.detector.spikes) + (self.detector.open is not None)

    def add(
        self, iteration: int, loss: float, updates: Mapping[str, Mapping[str, Any]] | None
    ) -> list[dict[str, Any]]:
        """Takes the next interval.

        Args:
            iteration: the interval's last.
            loss: its mean, nats; may be NaN or infinite.
            updates: its :func:`~megatron_s3.telemetry.updates.summary`, if there is one.

        Returns:
            Records of the spike that this one begins, and of the one that it ends: a
            :class:`~megatron_s3.telemetry.spikes.Spike`'s attributes, and ``first``, the layers and
            kinds of parameters that had risen before.
        """
        was_open = self.detector.open is not None
        ended = self.detector.add(iteration, loss)
        began = self.detector.open if not was_open else None
        now = None if updates is None else sizes(updates)
        if began is not None:
            history = list(self._sizes)
            # Of the interval before, if there is one: updates lead, the loss follows.
            leading = history[-1:] if len(history) > 1 else [now] if now else []
            self._first = rising(history[:-1], leading[0]) if leading else []
        if now is not None and self.detector.open is None:
            self._sizes.append(now)
        return [
            asdict(spike) | {"first": self._first} for spike in (began, ended) if spike is not None
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns what :meth:`load_state_dict` takes up again exactly; JSON can hold it."""
        return {
            "detector": self.detector.state_dict(),
            "sizes": list(self._sizes),
            "first": self._first,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state is none of this class.
        """
        if {"detector", "sizes", "first"} - set(state):
            raise ValueError("this is no state of a SpikeLog")
        self.detector.load_state_dict(state["detector"])
        self._sizes = deque(state["sizes"], maxlen=REMEMBERED)
        self._first = list(state["first"])
