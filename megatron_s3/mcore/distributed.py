"""ZeRO-1: an element-wise optimizer's state in Megatron-Core's DistributedOptimizer."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

__all__ = ["ElementwiseDistributedOptimizer", "sharded_class"]


class ElementwiseDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer around an :class:`~megatron_s3.optimizers.ElementwiseOptimizer`.

    Main parameters, shards, gradient reduction and parameter gathering are upstream's.  What is
    saved of the optimizer is named by its description, so that no checkpoint of it can be taken
    for Adam's.
    """

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """Names of the sharded state tensors (read by Megatron-Core from 0.19 on)."""
        return self.optimizer.description.state

    def _get_state_key_dtype(self, key: str) -> torch.dtype:
        return torch.float32

    def state_dict(self) -> dict[str, Any]:
        """What does not depend on the data-parallel rank: param groups and loss scale.

        Upstream's reads torch AdamW's ``step`` from every parameter's state, which is not there.
        """
        saved = self.optimizer.state_dict()
        groups = [{k: v for k, v in g.items() if k != "params"} for g in saved["param_groups"]]
        state_dict: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler:
            state_dict["grad_scaler"] = self.grad_scaler.state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As upstream, into state that is there already: it would allocate Adam's names."""
        self.optimizer.init_state()
        super().load_state_dict(state_dict)

    @torch.no_grad()  # fp32 main parameters are views of the model's, which autograd guards
    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict) -> None:
        super()._set_main_param_and_optimizer_states(model_param, tensors)


_ADAMS = ("param", "exp_avg", "exp_avg_sq")


@functools.cache
def sharded_class(state: tuple[str, ...]) -> type[ElementwiseDistributedOptimizer]:
    """The class for an optimizer with these state tensors.

    Before 0.19 upstream's checkpoint code holds the names of Adam's as a literal in four methods;
    there the class gets those methods with the literal replaced, and nothing else changed.
    """
    methods = {}
    if not hasattr(DistributedOptimizer, "optimizer_state_keys"):
        for name, function in vars(DistributedOptimizer).items():
            if inspect.isfunction(function) and _ADAMS in function.__code__.co_consts:
                methods[name] = _with_constant(function, _ADAMS, ("param", *state))
    return type("ElementwiseDistributedOptimizer", (ElementwiseDistributedOptimizer,), methods)


def _with_constant(function: Callable[..., Any], old: object, new: object) -> Callable[..., Any]:
    """A copy of the function in which one constant has another value."""
    code = function.__code__
    constants = tuple(new if constant == old else constant for constant in code.co_consts)
    return functools.update_wrapper(
        types.FunctionType(
            code.replace(co_consts=constants),
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        ),
        function,
    )
