"""The step of a fused kernel, from the part of it that can be prepared."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from megatron_s3.kernels.operands import Operands
from megatron_s3.kernels.statistics import Statistics

__all__ = ["step"]


@torch.no_grad()
def step(
    prepared: Callable[..., Any],
    rule: Callable[..., Tensor],
    operands: Sequence[Operands],
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    seed: int = 0,
    statistics: Statistics | None = None,
    **hyperparameters: object,
) -> None:
    """Takes one step of operands of one param group, as its kernel's ``Prepared`` describes it.

    Args:
        prepared: the kernel's class ``Prepared``.
        rule, operands, **hyperparameters: arguments for which the kernel's ``reason`` returns None.
        lr: learning rate, a number or a tensor of one element, on the parameters' device or the
            CPU.
        weight_decay: decoupled weight decay, likewise.
        seed: the number of the step, on which the noise of stochastic rounding depends.
        statistics: the statistics to which those of the step are added.

    Raises:
        RuntimeError: there is no such kernel.
    """
    prepared([operands]).step(rule, [(lr, weight_decay, seed)], statistics, **hyperparameters)
    # Autograd notices that parameters that it may have saved have changed.
    models = [o.model_param for o in operands if o.model_param is not None]
    increment_version([o.param for o in operands] + models)
