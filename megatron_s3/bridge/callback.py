"""A callback of Megatron-Bridge that writes the log of a run for programs, ``metrics.jsonl``."""

import time
from pathlib import Path

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.utils.flop_utils import num_floating_point_operations
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

from megatron_s3.mcore.run_metrics import CannotLog, RunMetrics

__all__ = ["CannotLog", "MetricsCallback"]


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
        self._metrics: RunMetrics | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Opens the log, and restores the spikes of earlier launches from it."""
        config, state = context.state.cfg, context.state
        folder = self.folder or config.logger.tensorboard_dir or config.checkpoint.save
        if folder is None:
            raise CannotLog(
                "MetricsCallback has no folder to write metrics.jsonl to. Give it one, or set "
                "logger.tensorboard_dir or checkpoint.save."
            )
        batch = config.train.global_batch_size
        self._metrics = RunMetrics(
            folder,
            context.optimizer,
            context.model,
            iteration=state.train_state.step,
            updates=self.updates,
            log_interval=config.logger.log_interval,
            seq_length=config.model.seq_length,
            global_batch_size=batch,
            train_iters=config.train.train_iters,
            seed=config.rng.seed,
            flops=lambda: float(num_floating_point_operations(config, batch)),
            writers=lambda: (state.tensorboard_logger, state.wandb_logger),
        )

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Counts an iteration, and writes the line of an interval at its end."""
        assert self._metrics is not None
        state = context.state.train_state
        self._metrics.step(
            state.step + 1,
            (context.loss_dict or {}).get("lm loss"),
            samples=state.consumed_train_samples + get_current_global_batch_size(),
            grad_norm=context.grad_norm,
            skipped=bool(context.skipped_iter),
        )

    def on_eval_start(self, context: CallbackContext) -> None:
        """Notes when an evaluation begins, which is no time of training."""
        self._begun = time.perf_counter()

    def on_eval_end(self, context: CallbackContext) -> None:
        """Writes the loss of an evaluation on the validation set."""
        self._evaluated(context, "valid")

    def on_test_start(self, context: CallbackContext) -> None:
        """Notes when an evaluation on the test set begins."""
        self._begun = time.perf_counter()

    def on_test_end(self, context: CallbackContext) -> None:
        """Writes the loss of an evaluation on the test set."""
        self._evaluated(context, "test")

    def _evaluated(self, context: CallbackContext, kind: str) -> None:
        if self._metrics is not None:
            losses = context.total_loss_dict or {}
            self._metrics.evaluated(self._begun, context.state.train_state.step, losses, kind)
