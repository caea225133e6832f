"""The state that the plugin keeps of a training, in one object."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Parameter

from megatron_s3.mcore.metrics_log import MetricsLog
from megatron_s3.mcore.update_log import UpdateLog

__all__ = ["Training", "running", "start"]


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
        unlike: parameters whose main parameters, as last loaded, differ from the weights.
        updated: whether there was an update.
    """

    optimizer: Callable[[], Any] = lambda: None
    update_log: UpdateLog | None = None
    metrics: MetricsLog | None = None
    spikes: dict[str, Any] | None = None
    evaluating: tuple[str | None, int] = (None, 0)
    said: set[str] = field(default_factory=set)
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
