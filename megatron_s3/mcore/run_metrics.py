"""The log of a run for programs without Megatron's trainer: their own loops, Megatron-Bridge."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_s3.errors import MegatronS3Error
from megatron_s3.mcore.chained import ElementwiseChainedOptimizer
from megatron_s3.mcore.metrics_log import MetricsLog, writing_rank
from megatron_s3.mcore.update_log import UpdateLog
from megatron_s3.telemetry import runlog
from megatron_s3.telemetry.spike_log import SpikeLog

__all__ = ["CannotLog", "RunMetrics"]


class CannotLog(MegatronS3Error, ValueError):
    """The log that is asked for cannot be written; the message gives the reason."""


class RunMetrics:
    """Writes losses, learning rates, spikes and, if asked for, updates to ``metrics.jsonl``.

    The lines are those of ``--plugin-metrics`` and ``--plugin-log-updates``, one for each interval,
    and ``megatron-s3 report`` reads them.  The last rank writes them.  A launch that resumes reads
    the losses so far from the file, so that the detector of spikes goes on.  Make it on every rank,
    after the optimizer was built and a checkpoint was loaded, and call :meth:`step` on every rank.

    Args:
        folder: the folder of the file, which is made if it does not exist.
        optimizer: the result of Megatron's ``get_megatron_optimizer``.
        model: the chunks of the model, in Megatron's wrapper.
        iteration: the number of iterations so far; 0 in a new run.
        updates: whether to log the sizes of updates by parameter type and layer; they are logged,
            too, if the optimizer's configuration has ``plugin_log_updates=True``.
        log_interval: iterations for each line.
        seq_length: tokens of a sample.
        global_batch_size: samples of an iteration over all ranks, for the first line.
        train_iters: iterations of the whole run, for the first line; None if unknown.
        seed: the run's seed, for the first line; None if unknown.
        flops: returns the floating-point operations of an iteration over all ranks.
        writers: returns writers of TensorBoard and of Weights & Biases, each or None, which get the
            updates too.

    Raises:
        CannotLog: updates are asked for and cannot be counted.
    """

    def __init__(
        self,
        folder: str | Path,
        optimizer: Any,
        model: Sequence[torch.nn.Module],
        *,
        iteration: int = 0,
        updates: bool = False,
        log_interval: int = 1,
        seq_length: int,
        global_batch_size: int,
        train_iters: int | None = None,
        seed: int | None = None,
        flops: Callable[[], float] | None = None,
        writers: Callable[[], tuple[Any, Any]] = lambda: (None, None),
    ) -> None:
        self._optimizer = optimizer
        self._log_interval = log_interval
        self._args = argparse.Namespace(
            **vars(optimizer.config)
            | {
                "tensorboard_dir": str(folder),
                "save": None,
                "seed": seed,
                "world_size": torch.distributed.get_world_size(),
                "global_batch_size": global_batch_size,
                "seq_length": seq_length,
                "train_iters": train_iters,
            }
        )
        self._log = MetricsLog(
            self._args,
            iteration,
            _update_log(optimizer, model, updates),
            _spikes(Path(folder), iteration),
            writers=writers,
            flops=lambda args: None if flops is None else flops(),
        )

    def step(
        self,
        iteration: int,
        loss: Tensor | float | None,
        *,
        samples: int,
        grad_norm: float | None = None,
        skipped: bool = False,
    ) -> None:
        """Counts an iteration, and writes the line of an interval at its end.

        Args:
            iteration: its number, from 1.
            loss: its loss, averaged over the ranks, on the last rank; elsewhere it is not used.
            samples: the samples of all iterations so far, this one included.
            grad_norm: the gradient norm, if it was computed.
            skipped: whether the optimizer did not update the parameters.
        """
        losses = {} if loss is None else {"lm loss": torch.as_tensor(loss)}
        self._log.count(losses, skipped)
        if iteration % self._log_interval == 0:
            self._args.consumed_train_samples = samples
            groups = self._optimizer.param_groups
            default = (g for g in groups if g.get("default_config", True) and g["params"])
            lr = next(default, groups[0])["lr"] if groups else None
            self._log.interval(self._args, iteration, None if lr is None else float(lr), grad_norm)

    def evaluated(
        self, begun: float, iteration: int, losses: Mapping[str, Any] | float, kind: str = "valid"
    ) -> None:
        """Writes the loss of an evaluation, and leaves its time out of the training time.

        Args:
            begun: when it began, by ``time.perf_counter``.
            iteration: the iteration after which it ran.
            losses: the loss, or losses by name, of which ``"lm loss"`` is written.
            kind: ``"valid"`` or ``"test"``.
        """
        named = losses if isinstance(losses, Mapping) else {"lm loss": losses}
        tensors = {name: torch.as_tensor(value) for name, value in named.items()}
        self._log.evaluated(begun, kind, iteration, tensors)


def _update_log(optimizer: Any, model: Sequence[torch.nn.Module], asked: bool) -> UpdateLog | None:
    """Returns what counts the updates, if that is asked for here or in the configuration."""
    if not isinstance(optimizer, ElementwiseChainedOptimizer):
        if asked:
            raise CannotLog(
                "updates=True counts updates of the plugin's optimizers, and this one is "
                f"{optimizer.config.optimizer}. Leave updates out."
            )
        return None
    if asked and optimizer.update_log is None:
        if getattr(optimizer.config, "optimizer_cuda_graph", False):
            raise CannotLog(
                "updates=True counts nothing with optimizer_cuda_graph, because a replay runs no "
                "Python. Leave one of the two out."
            )
        optimizer.training.update_log = UpdateLog(optimizer.parts, model)
    return optimizer.update_log


def _spikes(folder: Path, iteration: int) -> dict[str, Any] | None:
    """Returns the state of the spikes of earlier launches, from their lines so far."""
    if torch.distributed.get_rank() != writing_rank() or not (folder / runlog.NAME).is_file():
        return None
    spikes = SpikeLog()
    for record in runlog.read(folder):
        if record["kind"] != "train" or record["iteration"] > iteration or record["loss"] is None:
            continue
        updates = record.get("updates")
        numbers = None if updates is None else _numbers(updates)
        spikes.add(record["iteration"], float(record["loss"]), numbers)
    return spikes.state_dict()


def _numbers(values: Any) -> Any:
    """Returns the values of a line with NaN and infinities as numbers again."""
    if isinstance(values, dict):
        return {name: _numbers(value) for name, value in values.items()}
    return float(values) if isinstance(values, str) else values
