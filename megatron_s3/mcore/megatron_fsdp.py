"""An element-wise optimizer's state under Megatron-FSDP, whose parameters are DTensors."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.transformer import fsdp_dtensor_checkpoint
from torch import Tensor

from megatron_s3.kernels.operands import local
from megatron_s3.mcore.distributed import ElementwiseDistributedOptimizer
from megatron_s3.mcore.one_pass import Place, is_plain, place, require_memory
from megatron_s3.optimizers.values import values

__all__ = ["ElementwiseFSDPOptimizer", "preprocess_fsdp_dtensor_state_dict"]

#: The names that Megatron's functions for such checkpoints contain as a constant.
ADAMS = ("exp_avg", "exp_avg_sq")


class ElementwiseFSDPOptimizer(ElementwiseDistributedOptimizer):
    """DistributedOptimizer as Megatron-FSDP uses it: a shell without buffers of its own.

    The optimizer's parameters are Megatron-FSDP's main parameters: DTensors over the data-parallel
    ranks (complete on each rank with ``no_shard``). Gradients are in their ``grad``, or under
    ``--use-precision-aware-optimizer`` in ``decoupled_grad``, in any dtype.
    """

    def sharded_param_state_fsdp_dtensor(self, is_loading: bool = False) -> dict[str, Any]:
        """Calls Megatron's method; each rank names the state of each parameter, in the same order.

        Ranks exchange the places of all names, in order (Megatron sorts them from 0.17 on). A rank
        that holds no element of a parameter has no gradient for it, and would otherwise not name
        its state, or name it last.
        """
        self.optimizer.init_state()
        found: dict[str, Any] = super().sharded_param_state_fsdp_dtensor(is_loading)
        state = dict(sorted(found["state"].items()))
        for group in self.optimizer.param_groups:
            description = self.optimizer.algorithm_of(group).description
            for param in group["params"]:
                name = self._param_name(param)
                if name in state:
                    state[name] = values(description, param, state[name])
        return found | {"state": state}

    def _init_optimizer_states_with_dummy_values(self) -> None:
        self.optimizer.init_state()  # Megatron steps, which decays the weights

    def _copy_model_params_to_main_params(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing, because Megatron-FSDP loads a model into its main parameters.

        Megatron's method raises NotImplementedError, so a half-precision model could not be loaded
        alone.
        """

    def model_and_own_params(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the optimizer's parameters twice: they stand for Megatron-FSDP's."""
        yield from ((param, param) for param in self.get_parameters())

    def _places(self) -> tuple[Place, ...]:
        memory = []
        for params, group in self._weight_groups():
            models = group.model_weight_buffer
            memory += [group.main_weight_buffer.data, *(params[model] for model in group.params)]
            memory += group.params if models is None else [models.data]
        return tuple(map(place, memory))

    @torch.no_grad()
    def _find_model_params(self) -> dict[Tensor, Tensor] | None:
        """Returns the tensors to which Megatron's ``copy_main_weights_to_model_weights`` copies."""
        found = {}
        for params, group in self._weight_groups():
            mains, models = group.main_weight_buffer, group.model_weight_buffer
            for model in group.params:
                if models is None:
                    memory = local(model).detach().view(-1)
                else:
                    shard = models.is_data_distributed or mains.is_data_distributed
                    require_memory(models.data, "parameters", "reload_from_cpu")
                    memory = models.get_item(mains.param_idx[model], only_shard=shard)
                found[params[model]] = memory
        return found if all(map(is_plain, found.values())) else None

    def _grad_memory(self) -> Iterable[Tensor]:
        return ()  # Megatron-FSDP allocates it in each backward pass

    def _find_grads(self) -> None:
        return None  # the parameters have them

    def _weight_groups(self) -> Iterator[tuple[dict[Tensor, Tensor], Any]]:
        """Yields groups whose main parameters are separate tensors, by the model's parameters."""
        for chunk in self.model_chunks:
            buffer = chunk.param_and_grad_buffer
            params = {param.orig_param: param for _, param in buffer.optimizer_named_parameters}
            for group in buffer.parameter_groups:
                if group.main_weight_buffer is not None:
                    yield params, group


def preprocess_fsdp_dtensor_state_dict(
    original: Callable[..., Any], args: Any, raw_state_dict: dict[str, Any], model: Any
) -> Any:
    """Wraps the splitting of fused weights (of SwiGLU, Gated DeltaNet and MLA) and their states.

    Megatron's functions for it contain the names of Adam's states as literals, in all releases.
    """
    states = (raw_state_dict.get("optimizer") or {}).get("state") or {}
    # States of a parameter's shape only: torch's AdamW also has a step without dimensions.
    names = dict.fromkeys(
        name
        for state in states.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and value.dim()
    )
    with _splitting(tuple(names) or ADAMS):
        return original(args, raw_state_dict, model)


@contextlib.contextmanager
def _splitting(names: tuple[str, ...]) -> Iterator[None]:
    """Makes Megatron split states with these names, inside a ``with``."""
    kept = {
        function: function.__code__
        for function in vars(fsdp_dtensor_checkpoint).values()
        if inspect.isfunction(function) and ADAMS in function.__code__.co_consts
    }
    try:
        for function, code in kept.items():
            constants = tuple(names if c == ADAMS else c for c in code.co_consts)
            function.__code__ = code.replace(co_consts=constants)
        yield
    finally:
        for function, code in kept.items():
            function.__code__ = code
