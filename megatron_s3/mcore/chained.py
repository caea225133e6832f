"""The whole optimizer of a trainer, with the parts that Megatron chains in it."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_s3.mcore.announcement import say_path
from megatron_s3.mcore.arguments import needs_grad_norm
from megatron_s3.mcore.state import Training
from megatron_s3.mcore.update_log import UpdateLog

__all__ = ["ElementwiseChainedOptimizer", "replay"]


class ElementwiseChainedOptimizer(ChainedOptimizer):  # type: ignore[misc]  # Megatron has no types
    """The whole optimizer of a trainer.

    Upstream's :meth:`step` computes the global gradient norm each time, also where neither clipping
    nor a skip threshold needs it: 4 bytes a parameter, an all-reduce and a host synchronisation.
    Here it computes it where something needs it (:func:`~megatron_s3.mcore.arguments.\
needs_grad_norm`).
    """

    #: What the plugin keeps of the training that this is the optimizer of.
    training: Training

    #: Whether :meth:`step` is running and has no use for the norm.
    _without_grad_norm = False

    @classmethod
    def adopt(cls, built: ChainedOptimizer, training: Training) -> None:
        """Makes what Megatron built one of these, and the optimizer of a training."""
        built.__class__ = cls
        built.training = training
        training.optimizer = weakref.ref(built)

    @property
    def update_log(self) -> UpdateLog | None:
        """Returns what counts the updates, where they are logged."""
        return self.training.update_log

    def state_dict(self, is_loading: bool = False) -> Any:
        """Calls upstream's, without what torch_dcp asks with; the state is there in either case."""
        return super().state_dict()

    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        """Returns the norm of the prepared gradients over all ranks, whoever asks for it."""
        return 0.0 if self._without_grad_norm else super().get_grad_norm()

    @torch.no_grad()
    def step(self) -> tuple[bool, Any, Any]:
        """Steps as upstream does.

        Returns:
            Whether the parameters were updated; the gradient norm, 0.0 where it was not computed
            (``config.plugin_log_grad_norm = True`` has it computed); the number of zeros, None
            unless ``config.log_num_zeros_in_grad``. Both are None where a gradient overflowed, as
            upstream's.
        """
        self._without_grad_norm = not (self.chained_optimizers and needs_grad_norm(self.config))
        try:
            result: tuple[bool, Any, Any] = super().step()
        finally:
            self._without_grad_norm = False
        if not self.training.updated:
            say_path(self.chained_optimizers, self.training)
        return result

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Steps as upstream does, and counts the step where updates are logged."""
        log = self.update_log
        rates = None if log is None else log.rates()
        success: bool = super().step_with_ready_grads()
        if log is not None and rates is not None and success:
            log.count(rates)
        return success

    def _synchronize_steps(self) -> Any:
        """Brings parts that had nothing to update in some step to the number of the others.

        Upstream fails there.  Each of their parameters keeps its own number of updates.
        """
        parts = [part.optimizer for part in self.chained_optimizers if part.optimizer is not None]
        groups = [(part, group) for part in parts for group in part.param_groups]
        steps = [group["step"] for _, group in groups if group["params"]]
        if not steps:
            return None
        for part, group in groups:
            if group["step"] != max(steps):
                part.counts.keep(group)
            group["step"] = max(steps)
        return max(steps)


def replay(original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps a call that replays the optimizer's CUDA graph, without Python: counts the step.

    The call that captures runs the Python of the step that it then replays.
    """
    replays = wrapper.cuda_graph is not None
    result = original(wrapper, *args, **kwargs)
    built = getattr(wrapper.optimizer_step_func, "__self__", None)
    if replays and result[0] and isinstance(built, ElementwiseChainedOptimizer):
        for part in built.chained_optimizers:
            for group in part.optimizer.param_groups if part.optimizer is not None else ():
                group["step"] += 1
    return result
