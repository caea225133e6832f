"""Reads an optimizer's settings from Megatron's arguments or optimizer configuration."""

import math
from typing import Any

import torch

from megatron_s3.log import say_once
from megatron_s3.mcore.arguments.flags import SWITCHES
from megatron_s3.mcore.arguments.names import STATE_DTYPES, destination, dtype_of
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer
from megatron_s3.optimizers.counts import Watched
from megatron_s3.renamed import RENAMED, renamed

#: Optimizers of Megatron that leave some parameters to ``--muon-scalar-optimizer``.
MUONS = ("muon", "dist_muon", "adaptive_muon")

#: The values of that flag which Megatron builds itself.
_MEGATRONS = ("adam", "sgd", "lion")

__all__ = [
    "MUONS",
    "changes_by_step",
    "hyperparameters",
    "in_megatron_fsdp",
    "needs_grad_norm",
    "scalar_named",
    "scalar_optimizer",
    "state_dtypes",
    "switches",
]


def hyperparameters(cls: type[ElementwiseOptimizer], holder: Any) -> dict[str, Any]:
    """Returns an optimizer's hyperparameters by name.

    Args:
        cls: the optimizer.
        holder: Megatron's arguments or optimizer configuration; what it lacks has its default.
    """
    values = {}
    for h in cls.description.hyperparameters:
        value = getattr(holder, destination(cls.description, h), None)
        values[h.name] = h.default if value is None else value
    return values


def scalar_optimizer(holder: Any) -> type[ElementwiseOptimizer] | None:
    """Returns the plugin's optimizer for the parameters that Megatron's Muon leaves to another.

    It is None unless ``--muon-scalar-optimizer`` names one that Megatron does not have.

    Args:
        holder: Megatron's arguments or optimizer configuration.
    """
    if str(getattr(holder.optimizer, "asked", holder.optimizer)) not in MUONS:
        return None
    return scalar_named(getattr(holder, "muon_scalar_optimizer", None))


def scalar_named(name: str | None) -> type[ElementwiseOptimizer] | None:
    """Returns the plugin's optimizer of a name in that flag, None if Megatron builds it itself."""
    return None if name in _MEGATRONS else OPTIMIZERS.get(str(name))


def switches(holder: Any) -> dict[str, bool]:
    """Returns the values of :data:`SWITCHES` in Megatron's arguments or optimizer configuration."""
    found = {name: bool(getattr(holder, name, False)) for name, _ in SWITCHES}
    for old, new in RENAMED.items():
        if new in found and getattr(holder, old, False):
            say_once(renamed(old, new))
            found[new] = True
    return found


def state_dtypes(cls: type[ElementwiseOptimizer], holder: Any) -> dict[str, torch.dtype]:
    """Returns the dtypes of the states by name, from arguments or a configuration.

    ``--exp-avg-dtype`` sets the dtype of the first state and ``--exp-avg-sq-dtype`` that of the
    second, whatever their names are. Without ``--use-precision-aware-optimizer`` all are float32.
    Where a state may be stored as fractions of another, the flag's 8-bit value ``fp8`` means int8.
    """
    if not getattr(holder, "use_precision_aware_optimizer", False):
        return dict.fromkeys(cls.description.state, torch.float32)
    pairs = zip(cls.description.state, STATE_DTYPES, strict=False)
    found = {name: dtype_of(getattr(holder, asked)) for name, asked in pairs}
    for name in cls.description.fractions.keys() & found.keys():
        if found[name] == dtype_of("fp8"):
            found[name] = torch.int8
    return found


def needs_grad_norm(holder: Any) -> bool:
    """Returns whether clipping, a skip threshold or the log needs the gradient norm each step."""
    return (
        holder.clip_grad > 0
        or math.isfinite(getattr(holder, "grad_norm_skip_threshold", math.inf))
        or switches(holder)["plugin_log_grad_norm"]
    )


def in_megatron_fsdp(part: Any) -> bool:
    """Returns whether an optimizer of Megatron updates parameters of Megatron-FSDP."""
    return getattr(getattr(part, "ddp_config", None), "use_megatron_fsdp", False)


def changes_by_step(cls: type[ElementwiseOptimizer], values: dict[str, Any]) -> bool:
    """Returns whether the arguments of the update rule depend on the number of the step."""
    optimizer = cls([torch.zeros(1)], lr=0.0, **values)
    (group,) = optimizer.param_groups
    watched = Watched(group | {"step": 1})
    optimizer.group_hyperparameters(watched)
    return watched.read
