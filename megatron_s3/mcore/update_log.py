"""The largest |update| of each logging interval, to Megatron's TensorBoard writer."""

from collections.abc import Sequence

import torch

from megatron_s3.kernels.statistics import LARGEST, Statistics
from megatron_s3.optimizers import ElementwiseOptimizer

__all__ = ["UpdateLog"]


class UpdateLog:
    """Watches the updates of a trainer's optimizers.

    Off the logging interval it costs what the kernels count on their way, and no synchronisation;
    on it, one all-reduce of one number over all ranks.

    Args:
        optimizers: those of this rank.
    """

    def __init__(self, optimizers: Sequence[ElementwiseOptimizer]) -> None:
        self._statistics = Statistics(torch.cuda.current_device())
        for optimizer in optimizers:
            optimizer.statistics = self._statistics

    def after_step(self) -> None:
        """Writes and restarts the maximum, at iterations that Megatron logs."""
        from megatron.training import get_args, get_tensorboard_writer

        args = get_args()
        iteration = args.curr_iteration + 1
        if iteration % args.log_interval:
            return
        largest = self._statistics.values[0, LARGEST].clone()
        self._statistics.values.zero_()
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        if writer := get_tensorboard_writer():
            writer.add_scalar("update/max_abs", largest.item(), iteration)
