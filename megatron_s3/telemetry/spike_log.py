"""The loss spikes of a run, with the layers and parameter types whose updates rose first."""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_s3.telemetry.spikes import SpikeDetector
from megatron_s3.telemetry.updates import rising, sizes

__all__ = ["SpikeLog"]

#: Number of earlier intervals with which updates are compared.
REMEMBERED = 64


class SpikeLog:
    """A log of spikes, which follows the intervals of a run.

    Attributes:
        detector: the detector of spikes in the losses.
    """

    def __init__(self) -> None:
        self.detector = SpikeDetector()
        #: Mean |u| of the last intervals without a spike.
        self._sizes: deque[dict[str, dict[str, float]]] = deque(maxlen=REMEMBERED)
        #: Layers and parameter types whose updates rose before the last spike.
        self._first: list[str] = []

    @property
    def count(self) -> int:
        """The number of spikes so far, including one that has not ended."""
        return len(self.detector.spikes) + (self.detector.open is not None)

    def add(
        self, iteration: int, loss: float, updates: Mapping[str, Mapping[str, Any]] | None
    ) -> list[dict[str, Any]]:
        """Adds the next interval.

        Args:
            iteration: the last iteration of the interval.
            loss: its mean loss in nats; may be NaN or infinite.
            updates: its :func:`~megatron_s3.telemetry.updates.summary`, if there is one.

        Returns:
            Records of the spike that begins in this interval and of the spike that ends in it. A
            record holds the attributes of a :class:`~megatron_s3.telemetry.spikes.Spike`, and
            ``first``, the layers and parameter types whose updates had risen before.
        """
        was_open = self.detector.open is not None
        ended = self.detector.add(iteration, loss)
        began = self.detector.open if not was_open else None
        now = None if updates is None else sizes(updates)
        if began is not None:
            history = list(self._sizes)
            # The interval before, if there is one, is compared: updates rise before the loss does.
            leading = history[-1:] if len(history) > 1 else [now] if now else []
            self._first = rising(history[:-1], leading[0]) if leading else []
        if now is not None and self.detector.open is None:
            self._sizes.append(now)
        return [
            asdict(spike) | {"first": self._first} for spike in (began, ended) if spike is not None
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns a state that JSON can hold and :meth:`load_state_dict` restores exactly."""
        return {
            "detector": self.detector.state_dict(),
            "sizes": list(self._sizes),
            "first": self._first,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state that :meth:`state_dict` returned.

        Raises:
            ValueError: the state was not made by this class.
        """
        if {"detector", "sizes", "first"} - set(state):
            raise ValueError("the state was not made by SpikeLog.state_dict()")
        self.detector.load_state_dict(state["detector"])
        self._sizes = deque(state["sizes"], maxlen=REMEMBERED)
        self._first = list(state["first"])
