"""Saving SwiGLU weights of Megatron-FSDP needs states called exp_avg and exp_avg_sq.  One process.

The function that splits them is called alone, with an optimizer that has one state, as Lion and
SGD with momentum do.  It fails before it needs anything of Megatron-FSDP's.
"""

from types import SimpleNamespace
from typing import Any

import small_model
import torch
from megatron.core.transformer import fsdp_dtensor_checkpoint

small_model.start()
KEY = "module.decoder.layers.0.mlp.linear_fc1.weight"


class Model(torch.nn.Module):
    """Returns the parameter of a name, with its shard, as a model does."""

    config = SimpleNamespace(num_moe_experts=None)

    def get_parameter(self, target: str) -> Any:
        """Returns a parameter that one rank holds completely."""
        param = torch.nn.Parameter(torch.zeros(8, 4))
        param.megatron_fsdp_slice = slice(0, 32)
        submesh = SimpleNamespace(mesh=torch.zeros(1))
        index = SimpleNamespace(tp_dim="tp", get_submesh=lambda *args, **kwargs: submesh)
        param.megatron_fsdp_dist_index = index
        return param


class State(torch.Tensor):
    """A tensor with a DTensor's to_local."""

    def to_local(self) -> torch.Tensor:
        """Returns the elements of this rank: all."""
        return self.as_subclass(torch.Tensor)


fsdp_dtensor_checkpoint.HAVE_MEGATRON_FSDP = True
fsdp_dtensor_checkpoint.make_fsdp_dtensor = lambda tensor, *args, **kwargs: tensor
state = {"state": {KEY: {"exp_avg": torch.arange(32.0).view(8, 4).as_subclass(State)}}}
fault = None
try:
    _, split = fsdp_dtensor_checkpoint.handle_swiglu_in_state_dict(Model(), {}, state)
    print({key: sorted(states) for key, states in split["state"].items()})
except KeyError as error:
    fault = f"KeyError: {error}, a state that the optimizer does not have"
small_model.end(fault)
