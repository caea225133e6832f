"""Detection of loss spikes with robust statistics of the detrended log-loss."""

import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Spike", "SpikeDetector"]

RECENT = 8
_MAD_TO_SIGMA = 1.4826  # for the normal distribution


@dataclass
class Spike:
    """An excursion of the loss above its trend.

    Attributes:
        onset: iteration of the first loss of the spike.
        peak: iteration of the highest loss.
        end: iteration of the last loss of the spike; None while it has not ended.
        height: height of the peak above the trend in nats; inf if a loss was NaN or infinite.
        area: area above the trend in nats times iterations, without losses that are not finite.
        recovered: False if the loss did not return to the trend, and its new level was accepted.
    """

    onset: int
    peak: int
    end: int | None
    height: float
    area: float
    recovered: bool = True


class SpikeDetector:
    """A detector of spikes in a stream of losses.

    A spike begins with a loss that lies more than ``floor`` nats, and its logarithm more than
    ``enter`` robust standard deviations, above the trend; it ends when a loss lies less than
    ``leave`` deviations or half of ``floor`` above it.  The trend is a line through the medians of
    the halves of a window of accepted losses, or the median of the last 8 of them if that is
    higher; the deviation comes from the median absolute deviation (MAD) from the line.  Losses of a
    spike do not enter the window, so that a spike hides neither itself nor the next one.  If the
    loss has not returned after ``patience`` losses, the window starts again at the new level.

    Args:
        window: number of accepted losses that the trend uses.
        minimum: number of accepted losses before the first spike can be found.
        enter: robust standard deviations at which a spike begins.
        leave: robust standard deviations at which it ends, at most ``enter``.
        floor: height in nats at which a spike begins.
        patience: the most losses in a spike.

    Attributes:
        spikes: the spikes that have ended.
        open: the spike that has not ended, or None.
    """

    def __init__(
        self,
        window: int = 128,
        minimum: int = 32,
        enter: float = 7.0,
        leave: float = 3.0,
        floor: float = 0.05,
        patience: int = 512,
    ) -> None:
        if not 4 <= minimum <= window or not 0 < leave <= enter or floor < 0 or patience < 1:
            raise ValueError(
                f"SpikeDetector(window={window}, minimum={minimum}, enter={enter}, leave={leave}, "
                f"floor={floor}, patience={patience}): 4 <= minimum <= window, 0 < leave <= enter, "
                "floor >= 0 and patience >= 1 are required"
            )
        self.window, self.minimum = window, minimum
        self.enter, self.leave, self.floor, self.patience = enter, leave, floor, patience
        self.spikes: list[Spike] = []
        self.open: Spike | None = None
        self._accepted: deque[tuple[int, float]] = deque(maxlen=window)
        self._fit: tuple[float, float, float, float] | None = None
        self._last: int | None = None
        self._in_spike = 0

    def add(self, iteration: int, loss: float) -> Spike | None:
        """Adds the next loss.

        Args:
            iteration: its iteration, larger than that of the loss before.
            loss: the loss in nats; may be NaN or infinite.

        Returns:
            The spike that this loss ends, or None.
        """
        step = 1 if self._last is None else iteration - self._last
        self._last = iteration
        finite = math.isfinite(loss)
        log_loss = math.log(loss) if finite and loss > 0 else -math.inf
        if len(self._accepted) < self.minimum and self.open is None:
            self._accept(iteration, log_loss)
            return None
        if self._fit is None:
            self._fit = self._line()
        slope, level, sigma, recent = self._fit
        # After a steep beginning flattens, the line continues below the losses.
        expected = max(level + slope * iteration, recent)
        height = loss - math.exp(expected) if finite else math.inf
        deviations = (log_loss - expected) / sigma if finite else math.inf
        if self.open is None:
            if deviations > self.enter and height > self.floor:
                self.open = Spike(iteration, iteration, None, height, 0.0)
                self._in_spike = 1
                self._grow(iteration, height, step)
            else:
                self._accept(iteration, log_loss)
            return None
        if deviations < self.leave or height < self.floor / 2:
            spike = self._close(True)
            self._accept(iteration, log_loss)
            return spike
        self._grow(iteration, height, step)
        self._in_spike += 1
        if self._in_spike > self.patience:
            self._accepted.clear()
            return self._close(False)
        return None

    def _grow(self, iteration: int, height: float, step: int) -> None:
        assert self.open is not None
        self._at = iteration
        if height > self.open.height:
            self.open.peak, self.open.height = iteration, height
        if math.isfinite(height):
            self.open.area += height * step

    def _close(self, recovered: bool) -> Spike:
        spike, self.open = self.open, None
        assert spike is not None
        spike.end, spike.recovered = self._at, recovered
        self.spikes.append(spike)
        self._fit = None
        return spike

    def _accept(self, iteration: int, log_loss: float) -> None:
        if math.isfinite(log_loss):  # a loss of 0, where a batch has no targets, is on no line
            self._accepted.append((iteration, log_loss))
            self._fit = None

    def _line(self) -> tuple[float, float, float, float]:
        """Returns slope, level and deviation of the trend, and the median of the last losses."""
        points = list(self._accepted)
        half = len(points) // 2
        (x1, y1), (x2, y2) = (
            (statistics.median(x for x, _ in part), statistics.median(y for _, y in part))
            for part in (points[:half], points[half:])
        )
        slope = (y2 - y1) / (x2 - x1)
        level = statistics.median(y - slope * x for x, y in points)
        mad = statistics.median(abs(y - level - slope * x) for x, y in points)
        # Equal losses have no deviation, and every other loss would be a spike.
        recent = statistics.median(y for _, y in points[-RECENT:])
        return slope, level, max(mad * _MAD_TO_SIGMA, 1e-6), recent

    def state_dict(self) -> dict[str, Any]:
        """Returns a state that JSON can hold and :meth:`load_state_dict` restores exactly."""
        return {
            "accepted": [list(point) for point in self._accepted],
            "spikes": [_written(spike) for spike in self.spikes],
            "open": None if self.open is None else [_written(self.open), self._at, self._in_spike],
            "last": self._last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state that :meth:`state_dict` returned.

        Raises:
            ValueError: the state was not made by this class.
        """
        if {"accepted", "spikes", "open", "last"} - set(state):
            raise ValueError("the state was not made by SpikeDetector.state_dict()")
        self._accepted = deque(((i, y) for i, y in state["accepted"]), maxlen=self.window)
        self.spikes = [_read(spike) for spike in state["spikes"]]
        self.open, self._fit, self._last = None, None, state["last"]
        if state["open"] is not None:
            spike, self._at, self._in_spike = state["open"]
            self.open = _read(spike)


def _written(spike: Spike) -> dict[str, Any]:
    return asdict(spike) | {"height": str(spike.height)}


def _read(values: dict[str, Any]) -> Spike:
    known = {f.name: values[f.name] for f in fields(Spike)}
    return Spike(**known | {"height": float(values["height"])})
