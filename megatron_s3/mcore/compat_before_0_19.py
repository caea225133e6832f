"""Work-arounds for Megatron-Core before 0.19, to be deleted with support for older releases.

Also delete the rows of :mod:`megatron_s3.mcore.seams` that name it, and a base of ``OnePass``.

Before 0.19, four methods of Megatron's checkpoint code contain the names of Adam's states as
constants, for which later releases use ``optimizer_state_keys``; and the gradients for the norm are
read from a method of another name. In 0.18 the builder of Muon does not read
``muon_scalar_optimizer``.
"""

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

__all__ = ["METHODS", "MainGradsForNorm", "found", "leaves_to", "methods_that_name", "needed"]
__all__ += ["needed_for_muon"]


class MainGradsForNorm(MegatronOptimizer):  # type: ignore[misc]  # Megatron has no types
    """Provides the gradients if a norm is computed that the step does not need."""

    def get_main_grads_for_grad_norm(self) -> list[Tensor]:
        """Fills the main gradients, then calls Megatron's method."""
        self.give_main_grads()
        grads: list[Tensor] = super().get_main_grads_for_grad_norm()
        return grads


#: The methods of DistributedOptimizer that contain the names.
METHODS = (
    "get_parameter_state_dp_zero",
    "load_parameter_state_from_dp_zero",
    "load_parameter_state_from_dp_zero_legacy",
    "split_state_dict_if_needed",
)

_ADAMS = ("param", "exp_avg", "exp_avg_sq")


def needed() -> bool:
    """Returns whether the installed release contains the names as constants."""
    return not hasattr(DistributedOptimizer, "optimizer_state_keys")


def found(cls: type) -> set[str]:
    """Returns the names of the methods of a class that contain Adam's names."""
    functions = {name: value for name, value in vars(cls).items() if inspect.isfunction(value)}
    return {name for name, value in functions.items() if _ADAMS in value.__code__.co_consts}


def methods_that_name(state: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """Returns copies of the methods with other names of states; nothing else is changed."""
    return {name: _copy(vars(DistributedOptimizer)[name], ("param", *state)) for name in METHODS}


def _copy(function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    code = function.__code__
    constants = tuple(names if constant == _ADAMS else constant for constant in code.co_consts)
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


def needed_for_muon() -> bool:
    """Returns whether the builder of Muon ignores ``muon_scalar_optimizer``."""
    builder = getattr(optimizer, "_get_megatron_emerging_optimizer", None)
    return builder is not None and "muon_scalar_optimizer" not in builder.__code__.co_names


@contextlib.contextmanager
def leaves_to(name: str, config: Any) -> Iterator[None]:
    """Makes Megatron's registry say inside a ``with`` which optimizer gets what Muon leaves.

    Args:
        name: of the optimizer; in later releases the builder reads it from the configuration.
        config: Megatron's OptimizerConfig of Muon.
    """
    if not needed_for_muon():
        yield
        return
    from megatron.core.optimizer import emerging_optimizers

    muon = config.optimizer.removeprefix("dist_")
    kept = emerging_optimizers._EMERGING_OPTIMIZERS[muon]
    named = {key: {**own, "optimizer": name} for key, own in kept.default_param_overrides.items()}
    emerging_optimizers._EMERGING_OPTIMIZERS[muon] = dataclasses.replace(
        kept, default_param_overrides=named
    )
    try:
        yield
    finally:
        emerging_optimizers._EMERGING_OPTIMIZERS[muon] = kept
