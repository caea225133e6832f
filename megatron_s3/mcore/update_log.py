"""The largest |update| of each logging interval, to Megatron's TensorBoard writer."""

from collections.abc import Sequence

import torch

from megatron_s3.optimizers import ElementwiseOptimizer

__all__ = ["UpdateLog"]


class UpdateLog:
    """Watches the updates of a trainer's optimizers.

    Off the logging interval it costs a reduction over values that are in cache, and no
    synchronisation; on it, one all-reduce of one number over all ranks.

    Args:
        optimizers: those of this rank.
    """

    def __init__(self, optimizers: Sequence[ElementwiseOptimizer]) -> None:
        self._largest = torch.zeros((), device=torch.cuda.current_device())
        for optimizer in optimizers:
            optimizer.observe = self._observe

    def _observe(self, update: torch.Tensor) -> None:
        torch.maximum(self._largest, update.abs().amax().float(), out=self._largest)

    def after_step(self) -> None:
        """Writes and restarts the maximum, at iterations that Megatron logs."""
        from megatron.training import get_args, get_tensorboard_writer

        args = get_args()
        iteration = args.curr_iteration + 1
        if iteration % args.log_interval:
            return
        torch.distributed.all_reduce(self._largest, op=torch.distributed.ReduceOp.MAX)
        if writer := get_tensorboard_writer():
            writer.add_scalar("update/max_abs", self._largest.item(), iteration)
        self._largest.zero_()
