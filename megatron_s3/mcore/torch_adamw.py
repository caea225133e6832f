"""Repairs torch's AdamW in DistributedOptimizer, for machines without Transformer Engine and Apex.

torch keeps ``step`` as a tensor beside each parameter's averages, TE and Apex as a number in the
group.  Upstream's checkpoint code minds the difference in some places and not in others, so that
AdamW cannot resume there in a fresh process.  With TE or Apex the wrappers only hand on.
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
    """Wraps ``state_dict``, which reads every parameter's step: creates the state before a step.

    torch creates it in the first step; a fresh process that loads, or saves at once, has none.  A
    rank of which no parameter has an element never has one: it says 0, and rank 0's is saved.
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
    """Wraps the reading of one parameter's state: creates it before a step, as :func:`state_dict`.

    Under fp16, whose first steps may all be skipped, a checkpoint is saved before there is any.
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
    """Wraps ``load_state_dict``, which gives all parameters one step tensor that each counts.

    For every optimizer each param group gets back its own values
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
    """Wraps the filling of one parameter's state, which asks for every tensor that it holds.

    The step came with the groups and is there already; what stands beside the sharded tensors is
    the step of the template that they were loaded into (dp_reshardable), or nothing.  In fp32 the
    main parameters are views of the model's, which autograd guards.
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
