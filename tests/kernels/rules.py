"""The rules that the fused kernels have beside S3's, in the variants that differ for a kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_s3.optimizers import OPTIMIZERS

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A rule and its hyperparameters in one step, as the optimizer gives them."""

    rule: Callable[..., torch.Tensor]
    hyperparameters: dict[str, Any]
    states: tuple[str, ...]


def _case(name: str, step: int = 3, **hyperparameters: Any) -> Case:
    optimizer = OPTIMIZERS[name]([torch.zeros(1)], **hyperparameters)
    (group,) = optimizer.param_groups
    description = optimizer.description
    values = optimizer.group_hyperparameters(group | {"step": step})
    return Case(description.rule, values, description.state)


CASES = {
    "adamw": _case("adamw"),
    "adamw, first step": _case("adamw", 1),
    "adamw, clipped": _case("adamw", clip_update=0.7),
    "adamw, eps=0": _case("adamw", eps=0.0),
    "nadam": _case("nadam"),
    "nadam, first step": _case("nadam", 1),
    "adan": _case("adan"),
    "adan, first step": _case("adan", 1),
    "lion": _case("lion"),
    "sgdm": _case("sgdm"),
    "sgdm, nesterov": _case("sgdm", nesterov=True),
    "signsgd": _case("signsgd"),
    "signsgd, no momentum": _case("signsgd", momentum=0.0),
}
