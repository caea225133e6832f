"""The values of a parameter's state, in whatever form the state is stored.

A checkpoint holds values, so that an optimizer with states in any form can load them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_s3.kernels.compact import (
    FRACTION,
    REMAINDER,
    join,
    nearest_fractions,
    split,
    values_of_fractions,
)
from megatron_s3.optimizers.description import Description

__all__ = ["excess", "main_param_of", "put", "put_main_param", "values"]


def values(description: Description, param: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state with floating-point tensors in place of fractions and remainders.

    Values of fractions are rounded to bfloat16, from which the same fractions can be made again;
    main parameters are float32.  All other tensors are the state's own.

    Args:
        description: that of the algorithm of the parameter's group.
        param: the parameter, whose remainders a main parameter may hold.
        state: the parameter's state, complete or not.
    """
    found = dict(state)
    for name, whole in description.fractions.items():
        if _dtype(state.get(name)) == FRACTION:
            found[name] = values_of_fractions(state[name], state[whole]).to(torch.bfloat16)
    if "master_param" in state:
        found["master_param"] = main_param_of(param, state)
    return found


def main_param_of(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Returns a parameter's main parameter, made of remainders if it is stored so."""
    main: Tensor = state.get("master_param", param)
    return join(param.detach(), main) if _dtype(main) == REMAINDER else main


@torch.no_grad()
def put_main_param(param: Tensor, state: Mapping[str, Any], value: Tensor) -> None:
    """Stores a float32 main parameter, unless ``value`` is the tensor in which it is stored.

    A main parameter that is stored as remainders also sets the parameter, to the nearest bfloat16.
    """
    main = state.get("master_param", param)
    if main.dtype == REMAINDER:
        high, low = split(value.to(main.device, torch.float32).contiguous())
        param.detach().copy_(high)
        main.copy_(low)
    elif main is not value:
        main.copy_(value)


def _dtype(tensor: Any) -> torch.dtype | None:
    return getattr(tensor, "dtype", None)  # a caller may have put anything into the state


@torch.no_grad()
def put(
    description: Description, param: Tensor, state: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Copies values into a state, in the form in which it is stored.

    Args:
        description, param, state: as for :func:`values`.
        given: floating-point tensors by name; what is missing in the state is left out.
    """
    # A norm comes before the fractions of it.
    names = sorted(given.keys() & state.keys(), key=lambda name: name in description.fractions)
    for name in names:
        if name == "master_param":
            put_main_param(param, state, given[name])
        elif state[name].dtype == FRACTION:
            whole = state[description.fractions[name]]
            state[name].copy_(nearest_fractions(given[name].to(whole.device), whole))
        else:
            state[name].copy_(given[name])


def excess(description: Description, name: str, given: Mapping[str, Any]) -> str | None:
    """Returns why values cannot be stored as fractions, as the end of a message; or None.

    Args:
        description: as for :func:`values`.
        name: the state that would be stored as fractions.
        given: floating-point tensors by name.
    """
    value, whole = given[name].float(), given[description.fractions[name]].float()
    # Roundings to bfloat16, and denormal numbers, are no excess.
    over: Any = (value.abs() > whole * (1 + 2.0**-6) + torch.finfo(torch.float32).tiny).sum()
    count = int(over.full_tensor() if hasattr(over, "full_tensor") else over)
    if not count:
        return None
    return (
        f"exceeds {description.fractions[name]} in {count:,} of {value.numel():,} elements, as "
        f"after a conversion from AdamW, and torch.int8 holds fractions of it. Load it with {name} "
        "in torch.bfloat16 or torch.float32, train for some hundred steps, and save"
    )
