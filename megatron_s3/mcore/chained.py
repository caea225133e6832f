"""The optimizer of a trainer, with the optimizers that Megatron chains in it."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

from megatron_s3.mcore.announcement import say_path
from megatron_s3.mcore.arguments.readers import needs_grad_norm
from megatron_s3.mcore.state import Training
from megatron_s3.mcore.update_log import UpdateLog

__all__ = ["ElementwiseChainedOptimizer", "replay"]


class ElementwiseChainedOptimizer(ChainedOptimizer):  # type: ignore[misc]  # Megatron has no types
    """The optimizer of a trainer.

    Megatron's :meth:`step` always computes the global gradient norm, even if neither clipping nor a
    skip threshold needs it. This costs a read of 4 bytes per parameter, an all-reduce and a host
    synchronization. This class computes the norm only if something needs it
    (:func:`~megatron_s3.mcore.arguments.readers.needs_grad_norm`).
    """

    #: The plugin's record of the training to which this optimizer belongs.
    training: Training

    #: Whether :meth:`step` is running and nothing needs the norm.
    _without_grad_norm = False

    @classmethod
    def adopt(cls, built: ChainedOptimizer, training: Training) -> None:
        """Turns the optimizer that Megatron built into this class, and adds it to a training."""
        built.__class__ = cls
        built.training = training
        training.optimizer = weakref.ref(built)

    @property
    def update_log(self) -> UpdateLog | None:
        """Returns the counter of updates; None if updates are not logged."""
        return self.training.update_log

    @property
    def parts(self) -> list[MegatronOptimizer]:
        """Returns the chained optimizers that have parameters on this rank."""
        return [part for part in self.chained_optimizers if part.optimizer is not None]

    def state_dict(self, is_loading: bool = False) -> Any:
        """Returns Megatron's state dict.  ``is_loading`` is not needed: the state always exists."""
        return super().state_dict()

    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        """Returns the gradient norm over all ranks; 0.0 in a :meth:`step` that does not need it."""
        return 0.0 if self._without_grad_norm else super().get_grad_norm()

    @torch.no_grad()
    def step(self) -> tuple[bool, Any, Any]:
        """Performs a step, as Megatron's method does.

        Returns:
            Whether the parameters were updated; the gradient norm, or 0.0 if it was not computed
            (``config.plugin_log_grad_norm = True`` always computes it); and the number of zeros in
            the gradients, or None without ``config.log_num_zeros_in_grad``. The last two are None
            if a gradient overflowed.
        """
        self._without_grad_norm = not (self.chained_optimizers and needs_grad_norm(self.config))
        try:
            result: tuple[bool, Any, Any] = super().step()
        finally:
            self._without_grad_norm = False
        if not self.training.updated:
            say_path([part.optimizer for part in self.parts], self.training)
        return result

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Performs a step on prepared gradients, and counts it if updates are logged."""
        log = self.update_log
        rates = None if log is None else log.rates()
        success: bool = super().step_with_ready_grads()
        if log is not None and rates is not None and success:
            log.count(rates)
        return success

    def _synchronize_steps(self) -> Any:
        """Gives all param groups the same step count, even if some had nothing to update in a step.

        Megatron's method raises an error in this case.  Each parameter keeps its own number of
        updates.

        Returns:
            The step count; None if there are no parameters.
        """
        groups = [(part, group) for part in self.parts for group in part.optimizer.param_groups]
        step = max((group["step"] for _, group in groups if group["params"]), default=None)
        for part, group in groups if step is not None else ():
            if group["step"] != step:
                part.optimizer.counts.keep(group)
            group["step"] = step
        return step


def replay(original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps the call that replays the optimizer's CUDA graph: counts the step.

    A replay runs no Python code, so the step does not count itself.  The call that captures the
    graph does.
    """
    replays = wrapper.cuda_graph is not None
    result = original(wrapper, *args, **kwargs)
    built = getattr(wrapper.optimizer_step_func, "__self__", None)
    if replays and result[0] and isinstance(built, ElementwiseChainedOptimizer):
        for part in built.parts:
            for group in part.optimizer.param_groups:
                group["step"] += 1
    return result
