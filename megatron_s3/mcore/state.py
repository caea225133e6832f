"""The one object that holds what the plugin keeps of a training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Parameter

from megatron_s3.mcore.metrics_log import MetricsLog
from megatron_s3.mcore.update_log import UpdateLog

__all__ = ["Training", "running", "start"]


@dataclass
class Training:
    """The state that the plugin keeps of a training beside Megatron's own; its optimizer holds it.

    Attributes:
        optimizer: returns the plugin's, as long as someone uses it; None of Megatron's own.
        update_log: what counts its updates, if they are logged.
        metrics: the log of the run, from its first iteration on, if there is one.
        spikes: of the checkpoint that was loaded: a state of SpikeLog.
        evaluating: the text (valid or test) and the iteration of the evaluation under way.
        said: the paths of an update that rank 0 has said.
        unlike: the model's parameters whose main parameters, as loaded last, are not the weights.
        updated: whether there has been an update.
    """

    optimizer: Callable[[], Any] = lambda: None
    update_log: UpdateLog | None = None
    metrics: MetricsLog | None = None
    spikes: dict[str, Any] | None = None
    evaluating: tuple[str | None, int] = (None, 0)
    said: set[str] = field(default_factory=set)
    unlike: list[Parameter] = field(default_factory=list)
    updated: bool = False


#: Of this process, as Megatron's own arguments and writers are: its log, its evaluation and its
#: reading of a checkpoint name neither the model nor the optimizer that they are of.
_running = Training()


def running() -> Training:
    """Returns the training whose optimizer was built last."""
    return _running


def start(training: Training) -> None:
    """Makes a training the one that runs."""
    global _running
    _running = training
