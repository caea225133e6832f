"""The state that the plugin keeps of a training, in one object."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch.nn import Parameter

from megatron_s3.log import say_once
from megatron_s3.mcore.metrics_log import MetricsLog
from megatron_s3.mcore.update_log import UpdateLog

__all__ = ["Scheduled", "Training", "running", "start"]


@dataclass
class Scheduled:
    """The values from which a schedule sets a param group that was loaded.

    Attributes:
        group: the param group.
        own: this run's values.
        saved: the checkpoint's values of the same names.
    """

    group: dict[str, Any]
    own: dict[str, Any]
    saved: dict[str, Any]

    def apply(self, from_checkpoint: bool) -> None:
        """Sets the group to the values of the checkpoint or of this run, and logs a difference."""
        chosen = self.saved if from_checkpoint else self.own
        differing = [name for name, value in self.saved.items() if value != self.own[name]]
        then, now = (
            " ".join(f"{name}={values[name]}" for name in differing)
            for values in (self.saved, self.own)
        )
        if differing and not from_checkpoint:
            say_once(f"a param group was saved with {then}; the run continues with {now}")
        elif any(self.group[name] != chosen[name] for name in differing):
            say_once(f"the schedule uses the checkpoint's {then} of a param group, not {now}")
        self.group.update(chosen)


@dataclass
class Training:
    """The plugin's state of a training; its optimizer holds this object.

    Attributes:
        optimizer: a weak reference to the plugin's optimizer; returns None with Megatron's own.
        update_log: counts the updates, if they are logged.
        metrics: the log of the run from its first iteration on, if there is one.
        spikes: the state of SpikeLog in the checkpoint that was loaded.
        evaluating: the text (valid or test) and the iteration of the running evaluation.
        said: the paths of an update that rank 0 has logged.
        scheduled: for each of Megatron's optimizers that was loaded, the schedules of its groups.
    unlike: parameters whose main parameters, as last loaded, differ from the weights.
        updated: whether there was an update.
    """

    optimizer: Callable[[], Any] = lambda: None
    update_log: UpdateLog | None = None
    metrics: MetricsLog | None = None
    spikes: dict[str, Any] | None = None
    evaluating: tuple[str | None, int] = (None, 0)
    said: set[str] = field(default_factory=set)
    scheduled: WeakKeyDictionary[Any, list[Scheduled]] = field(default_factory=WeakKeyDictionary)
    unlike: list[Parameter] = field(default_factory=list)
    updated: bool = False


#: Per process, like Megatron's own arguments and writers: Megatron's log, evaluation and checkpoint
#: reading do not name their model or optimizer.
_running = Training()


def running() -> Training:
    """Returns the training whose optimizer was built last."""
    return _running


def start(training: Training) -> None:
    """Makes a training the running one."""
    global _running
    _running = training
