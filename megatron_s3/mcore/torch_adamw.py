"""Repairs torch's AdamW in DistributedOptimizer, for machines without Transformer Engine and Apex.

torch keeps ``step`` as a tensor next to each parameter's averages, TE and Apex as a number in the
group. Megatron's checkpoint code handles the difference in some places only, so AdamW cannot resume
in a new process. With TE or Apex the wrappers only call Megatron's functions.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_s3.mcore.checkpoint import param_groups, shards

__all__ = [
    "get_main_param_and_optimizer_states",
    "load_state_dict",
    "set_main_param_and_optimizer_states",
    "state_dict",
]


def state_dict(original: Callable[..., Any], optimizer: Any) -> Any:
    """Wraps ``state_dict``, which reads every parameter's step; creates the state before that.

    torch creates the state in the first step; a new process that loads, or saves at once, has none.
    A rank that holds no element of any parameter never has one: it returns 0, and rank 0's value is
    saved.
    """
    if not _needs_repair(optimizer) or optimizer.optimizer.state:
        return original(optimizer)
    state = optimizer.optimizer.state
    _make_state(optimizer)
    if state:
        return original(optimizer)
    state["no parameter"] = {"step": torch.tensor(0.0)}
    try:
        return original(optimizer)
    finally:
        state.clear()


def get_main_param_and_optimizer_states(
    original: Callable[..., Any], optimizer: Any, model_param: Any
) -> dict[str, Any]:
    """Wraps the reading of a parameter's state; creates the state before, as :func:`state_dict`.

    Under fp16 all first steps may be skipped, so a checkpoint may be saved before there is a state.
    """
    if _needs_repair(optimizer) and not optimizer.optimizer.state:
        _make_state(optimizer)
    states: dict[str, Any] = original(optimizer, model_param)
    return states


def _make_state(optimizer: Any) -> None:
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    for each in optimizer.optimizer.state.values():
        each["step"] = torch.tensor(0.0)


def load_state_dict(original: Callable[..., Any], optimizer: Any, saved: dict[str, Any]) -> Any:
    """Wraps ``load_state_dict``, which gives all parameters the same step tensor, counted by each.

    With every optimizer, each param group gets back its own values
    (:func:`megatron_s3.mcore.checkpoint.param_groups.load_state_dict`).
    """
    result = param_groups.load_state_dict(original, optimizer, saved)
    if _needs_repair(optimizer):
        for state in optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
    return result


def set_main_param_and_optimizer_states(
    original: Callable[..., Any], optimizer: Any, model_param: Any, tensors: dict[str, Any]
) -> Any:
    """Wraps the filling of a parameter's state, which requires every tensor that it holds.

    The step comes with the groups and is already there. Next to the sharded tensors there is the
    step of the template into which they were loaded (dp_reshardable), or nothing. In fp32, main
    parameters are views of the model's, which autograd protects.
    """
    if _needs_repair(optimizer):
        group, order = optimizer.model_param_group_index_map[model_param]
        main_param = optimizer.optimizer.param_groups[group]["params"][order]
        tensors = tensors | {"step": optimizer.optimizer.state[main_param]["step"]}
    shards.note_unlike(optimizer, model_param, tensors)
    with torch.no_grad():
        return original(optimizer, model_param, tensors)


def _needs_repair(optimizer: Any) -> bool:
    return not distrib_optimizer.HAVE_APEX_OR_TE and isinstance(
        optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW
    )
