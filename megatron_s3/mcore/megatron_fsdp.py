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

__all__ = ["ElementwiseFSDPOptimizer", "preprocess_fsdp_dtensor_state_dict"]

#: What Megatron's functions for such checkpoints hold as a constant.
ADAMS = ("exp_avg", "exp_avg_sq")


class ElementwiseFSDPOptimizer(ElementwiseDistributedOptimizer):
    """DistributedOptimizer as Megatron-FSDP uses it: a shell without buffers of its own.

    The optimizer's parameters are Megatron-FSDP's main parameters, DTensors over the data-parallel
    ranks (whole on every one with ``no_shard``), and gradients come as their ``grad``, or under
    ``--use-precision-aware-optimizer``, in whatever dtype, as their ``decoupled_grad``.
    """

    def sharded_param_state_fsdp_dtensor(self, is_loading: bool = False) -> dict[str, Any]:
        """Calls upstream's; every rank names the state of every parameter, in the same order.

        Ranks exchange the places of all that they name, in order (which upstream itself sorts from
        0.17 on).  Of a parameter that it holds no element of, a rank has no gradient, and so would
        have no state to name, or would name it last.
        """
        self.optimizer.init_state()
        found: dict[str, Any] = super().sharded_param_state_fsdp_dtensor(is_loading)
        return found | {"state": dict(sorted(found["state"].items()))}

    def _init_optimizer_states_with_dummy_values(self) -> None:
        self.optimizer.init_state()  # upstream steps, which decays the weights

    def _copy_model_params_to_main_params(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: what Megatron-FSDP loads of a model are its main parameters.

        Upstream raises NotImplementedError: no half-precision model could be loaded alone.
        """

    def _places(self) -> tuple[Place, ...]:
        memory = []
        for params, group in self._weight_groups():
            models = group.model_weight_buffer
            memory += [group.main_weight_buffer.data, *(params[model] for model in group.params)]
            memory += group.params if models is None else [models.data]
        return tuple(map(place, memory))

    @torch.no_grad()
    def _find_model_params(self) -> dict[Tensor, Tensor] | None:
        """Returns where upstream's ``copy_main_weights_to_model_weights`` would copy to."""
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
        """Yields groups whose main parameters are apart, with the optimizer's by the model's."""
        for chunk in self.model_chunks:
            buffer = chunk.param_and_grad_buffer
            params = {param.orig_param: param for _, param in buffer.optimizer_named_parameters}
            for group in buffer.parameter_groups:
                if group.main_weight_buffer is not None:
                    yield params, group


def preprocess_fsdp_dtensor_state_dict(
    original: Callable[..., Any], args: Any, raw_state_dict: dict[str, Any], model: Any
) -> Any:
    """Wraps the splitting of fused weights (SwiGLU's, Gated DeltaNet's, MLA's) and their states.

    Upstream's functions for it have the names of Adam's states as literals, in every release.
    """
    states = (raw_state_dict.get("optimizer") or {}).get("state") or {}
    # What is of a parameter's shape: torch's AdamW has a step without dimensions beside it.
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
    """Makes Megatron split states of these names, inside a ``with``."""
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
