"""The step in one pass over memory, which reads gradients and writes parameters in place.

Megatron's step of half-precision models makes three passes: it copies gradients to fp32 main
gradients, the optimizer steps the main parameters, and it copies these to the model's. Here the
optimizer gets the tensors at both ends.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    MixedPrecisionOptimizer,
)
from torch import Tensor

from megatron_s3.kernels.operands import local
from megatron_s3.mcore.arguments.readers import needs_grad_norm
from megatron_s3.mcore.checkpoint import param_groups
from megatron_s3.mcore.compat_before_0_19 import MainGradsForNorm
from megatron_s3.optimizers import ElementwiseOptimizer

__all__ = ["ElementwiseFloat16Optimizer", "OnePass", "Place", "is_plain", "place", "require_memory"]

#: A storage, an address in it, and the size of the storage.
Place = tuple[int, int, int]


class OnePass(MainGradsForNorm, MixedPrecisionOptimizer):  # type: ignore[misc]  # Megatron has no types
    """Mixin that comes before one of Megatron's mixed-precision optimizers in a class's bases.

    With ``fused=False`` in the optimizer, or if :meth:`_find_model_params` finds a model parameter
    that is not a plain tensor, everything is done as in Megatron.
    """

    optimizer: ElementwiseOptimizer

    #: Whether the running step writes the model's parameters.
    _writing = False
    #: Whether the optimizer last got Megatron's own gradients.
    _grads_in_place = False
    #: The values on which :attr:`_found` depends.
    _found_for: tuple[Place, ...] | None = None
    _found: dict[Tensor, Tensor] | None = None

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Calls Megatron's method after it has located the model's parameters and gradients.

        Raises:
            RuntimeError: they were moved to a place where a step does not reach the model. No
                parameter was changed.
        """
        self._locate()
        for grad in self._grad_memory():
            require_memory(grad, "gradients", "restore_grad_buffers")
        overflowed: bool = super().prepare_grads()
        return overflowed

    def step_with_ready_grads(self) -> bool:
        """Steps as Megatron does, in one pass if that is possible."""
        model_params = None if self.optimizer.fused is False else self._found
        self.optimizer.host.model_params = model_params or {}
        self._writing = model_params is not None
        try:
            success: bool = super().step_with_ready_grads()
            return success
        finally:
            self._writing, self.optimizer.host.model_params = False, {}

    def _copy_main_params_to_model_params(self) -> None:
        if not self._writing:
            super()._copy_main_params_to_model_params()

    def _copy_model_grads_to_main_grads(self) -> None:
        self._clear_decoupled_grads()
        pairs = None
        # Code that unscales, clips, measures or counts gradients uses ``.grad``, in fp32.
        config = self.config
        if not (
            self.optimizer.fused is False
            or self._holds_master_params()
            or self.grad_scaler
            or needs_grad_norm(config)
            or config.log_num_zeros_in_grad
        ):
            pairs = self._find_grads()
        # Megatron passes fp32 gradients without a copy, too.
        if pairs is None or all(grad is None or grad.dtype == torch.float32 for _, grad in pairs):
            super()._copy_model_grads_to_main_grads()
            return
        self._grads_in_place = True
        for main_param, grad in pairs:
            main_param.grad = None
            main_param.decoupled_grad = grad  # type: ignore[attr-defined]  # Megatron's name

    def get_grads_for_grad_norm(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Fills the main gradients, in case a norm is needed, then calls Megatron's method."""
        self.give_main_grads()
        grads: list[Tensor] = super().get_grads_for_grad_norm(*args, **kwargs)
        return grads

    def give_main_grads(self) -> None:
        """Copies the gradients to the main gradients, if a step has not done so."""
        if self._grads_in_place:
            self._clear_decoupled_grads()
            super()._copy_model_grads_to_main_grads()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Calls Megatron's method, and drops references to gradients in Megatron's buffers."""
        super().zero_grad(set_to_none)
        self._clear_decoupled_grads()

    def _clear_decoupled_grads(self) -> None:
        if self._grads_in_place:
            for param in self.get_parameters():
                param.decoupled_grad = None
            self._grads_in_place = False

    def _locate(self) -> None:
        """Finds the model's parameters again if one of them, or of the optimizer's, was moved."""
        if self._places() != self._found_for:
            self._found = self._find_model_params()
            self._found_for = self._places()  # after the search, which may move a shard back

    def model_and_own_params(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the model's parameters with elements on this rank, each with the optimizer's."""
        raise NotImplementedError

    def _holds_master_params(self) -> bool:
        """Returns whether the optimizer has the model's parameters and main parameters as state."""
        return bool(self.optimizer.host.master_params)

    def _places(self) -> tuple[Place, ...]:
        """Returns values that change when a tensor that a step writes is moved."""
        raise NotImplementedError

    def _find_model_params(self) -> dict[Tensor, Tensor] | None:
        """Returns the model memory of each main parameter; None if Megatron's copies are used.

        Raises:
            RuntimeError: the memory was freed, or the model does not read it.
        """
        raise NotImplementedError

    def _grad_memory(self) -> Iterable[Tensor]:
        """Returns tensors whose memory holds all gradients of the model."""
        raise NotImplementedError

    def _find_grads(self) -> list[tuple[Tensor, Tensor | None]] | None:
        """Returns main parameters and Megatron's gradients; None if Megatron's copies are used."""
        raise NotImplementedError


# Megatron is not typed.
class ElementwiseFloat16Optimizer(OnePass, Float16OptimizerWithFloat16Params):  # type: ignore[misc]
    """Megatron's unsharded optimizer of half-precision models, with a step in one pass."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Calls Megatron's method; each group gets its own values, wrapped or not."""
        upstreams = inspect.unwrap(Float16OptimizerWithFloat16Params.load_state_dict)
        param_groups.load_state_dict(upstreams, self, state_dict)

    def model_and_own_params(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the model's parameters, each with the optimizer's, which is itself if in fp32."""
        yield from self._halves()
        yield from ((param, param) for group in self.fp32_from_fp32_groups for param in group)

    def _halves(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the model's half-precision parameters with their main parameters."""
        for models, mains in zip(self.float16_groups, self.fp32_from_float16_groups, strict=True):
            yield from zip(models, mains, strict=True)

    def _places(self) -> tuple[Place, ...]:
        return tuple(place(model) for model, _ in self._halves())

    def _find_model_params(self) -> dict[Tensor, Tensor] | None:
        # Under --use-torch-fsdp2 this rank's shard.
        found = {main: local(model.detach()) for model, main in self._halves()}
        for memory in filter(is_plain, found.values()):
            require_memory(memory, "parameters", "reload_from_cpu")
        return found if all(map(is_plain, found.values())) else None

    def _grad_memory(self) -> Iterable[Tensor]:
        grads = (_grad(model) for model, _ in self.model_and_own_params())
        return (grad for grad in grads if grad is not None)

    def _find_grads(self) -> list[tuple[Tensor, Tensor | None]] | None:
        return [(main, _grad(model)) for model, main in self.model_and_own_params()]


def _grad(param: Tensor) -> Tensor | None:
    return param.main_grad if hasattr(param, "main_grad") else param.grad


def is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor is plain: not quantized, distributed or a subclass."""
    return type(tensor.detach()) is Tensor and tensor.dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )


def place(tensor: Tensor) -> Place:
    """Returns the place of a tensor's elements (for a DTensor, of those on this rank).

    An address alone is not enough: a storage that is freed and allocated again keeps its views, and
    its old address may belong to another tensor.
    """
    tensor = local(tensor)
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.data_ptr(), storage.nbytes()


def require_memory(tensor: Tensor, what: str, remedy: str) -> None:
    """Raises RuntimeError if the tensor's storage was freed.

    Args:
        tensor: a plain or distributed tensor.
        what: the kind of its elements, for the message.
        remedy: the method that allocates them again.
    """
    tensor = local(tensor)
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    if tensor.numel() and tensor.untyped_storage().nbytes() < needed:
        raise RuntimeError(
            f"the model's {what} of shape {tuple(tensor.shape)} have no memory now, because it "
            f"was freed, as offloading does. Allocate it again ({remedy}) before the step. No "
            "parameter was changed."
        )
