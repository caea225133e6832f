"""A callback of Megatron-Bridge that writes the log of a run for programs, ``metrics.jsonl``."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.utils.flop_utils import num_floating_point_operations
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

from megatron_s3.errors import MegatronS3Error
from megatron_s3.mcore.chained import ElementwiseChainedOptimizer
from megatron_s3.mcore.metrics_log import MetricsLog, writing_rank
from megatron_s3.mcore.update_log import UpdateLog
from megatron_s3.telemetry import runlog
from megatron_s3.telemetry.spike_log import SpikeLog

__all__ = ["CannotLog", "MetricsCallback"]


class CannotLog(MegatronS3Error, ValueError):
    """The log that is asked for cannot be written; the message gives the reason."""


class MetricsCallback(Callback):  # type: ignore[misc]  # Bridge has no types
    """Writes losses, learning rates, spikes and, if asked for, updates to ``metrics.jsonl``.

    The lines are those of ``--plugin-metrics`` and ``--plugin-log-updates``, one for each
    ``logger.log_interval`` iterations, and ``megatron-s3 report`` reads them.  Updates go to
    Bridge's writers of TensorBoard and Weights & Biases, too.  With another optimizer than the
    plugin's everything but the updates is written.

    Args:
        folder: the folder of the file; ``logger.tensorboard_dir`` or ``checkpoint.save`` if None.
        updates: whether to log the sizes of updates by parameter type and layer.

    Raises:
        CannotLog: when training starts: there is no folder, or updates cannot be counted.
    """

    def __init__(self, folder: str | Path | None = None, *, updates: bool = False) -> None:
        self.folder = folder
        self.updates = updates
        self._begun = 0.0
        self._log: MetricsLog | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Opens the log, and restores the spikes of earlier launches from it."""
        config, step = context.state.cfg, context.state.train_state.step
        folder = self.folder or config.logger.tensorboard_dir or config.checkpoint.save
        if folder is None:
            raise CannotLog(
                "MetricsCallback has no folder to write metrics.jsonl to. Give it one, or set "
                "logger.tensorboard_dir or checkpoint.save."
            )
        self._log = MetricsLog(
            _arguments(context, folder),
            step,
            _update_log(context, self.updates),
            _spikes(Path(folder), step),
            writers=lambda: (context.state.tensorboard_logger, context.state.wandb_logger),
            flops=lambda args: float(num_floating_point_operations(config, args.global_batch_size)),
        )

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Counts an iteration, and writes the line of an interval at its end."""
        assert self._log is not None
        config, iteration = context.state.cfg, context.state.train_state.step + 1
        self._log.count(context.loss_dict or {}, bool(context.skipped_iter))
        if iteration % config.logger.log_interval == 0:
            args = _arguments(context, "")
            args.consumed_train_samples += get_current_global_batch_size()
            groups = context.optimizer.param_groups
            default = (g for g in groups if g.get("default_config", True) and g["params"])
            lr = next(default, groups[0])["lr"] if groups else None
            norm = context.grad_norm
            self._log.interval(args, iteration, None if lr is None else float(lr), norm)

    def on_eval_start(self, context: CallbackContext) -> None:
        """Notes when an evaluation begins, which is no time of training."""
        self._begun = time.perf_counter()

    def on_eval_end(self, context: CallbackContext) -> None:
        """Writes the loss of an evaluation."""
        if self._log is not None:
            losses = {k: torch.as_tensor(v) for k, v in (context.total_loss_dict or {}).items()}
            step = context.state.train_state.step
            self._log.evaluated(self._begun, "valid", step, losses)


def _arguments(context: CallbackContext, folder: str | Path) -> argparse.Namespace:
    """Returns Bridge's configuration under the names of Megatron's arguments."""
    config = context.state.cfg
    values = vars(config.optimizer) | {
        "tensorboard_dir": str(folder),
        "save": None,
        "seed": config.rng.seed,
        "world_size": torch.distributed.get_world_size(),
        "global_batch_size": config.train.global_batch_size,
        "seq_length": config.model.seq_length,
        "train_iters": config.train.train_iters,
        "consumed_train_samples": context.state.train_state.consumed_train_samples,
    }
    return argparse.Namespace(**values)


def _update_log(context: CallbackContext, asked: bool) -> UpdateLog | None:
    """Returns what counts the updates, if that is asked for here or in the configuration."""
    optimizer = context.optimizer
    if not isinstance(optimizer, ElementwiseChainedOptimizer):
        if asked:
            raise CannotLog(
                "MetricsCallback(updates=True) counts updates of the plugin's optimizers, and the "
                f"recipe's is {context.state.cfg.optimizer.optimizer}. Leave updates out."
            )
        return None
    if asked and optimizer.update_log is None:
        if getattr(context.state.cfg.optimizer, "optimizer_cuda_graph", False):
            raise CannotLog(
                "MetricsCallback(updates=True) counts nothing with optimizer.optimizer_cuda_graph, "
                "because a replay runs no Python. Leave one of the two out."
            )
        parts = [part for part in optimizer.chained_optimizers if part.optimizer is not None]
        optimizer.training.update_log = UpdateLog(parts, context.model)
    return optimizer.update_log


def _spikes(folder: Path, step: int) -> dict[str, Any] | None:
    """Returns the state of the spikes of earlier launches, from their lines up to this step."""
    if torch.distributed.get_rank() != writing_rank() or not (folder / runlog.NAME).is_file():
        return None
    spikes = SpikeLog()
    for record in runlog.read(folder):
        if record["kind"] == "train" and record["iteration"] <= step and record["loss"] is not None:
            updates = record.get("updates")
            numbers = None if updates is None else _numbers(updates)
            spikes.add(record["iteration"], float(record["loss"]), numbers)
    return spikes.state_dict()


def _numbers(values: Any) -> Any:
    """Returns the values of a line with NaN and infinities as numbers again."""
    if isinstance(values, dict):
        return {name: _numbers(value) for name, value in values.items()}
    return float(values) if isinstance(values, str) else values
