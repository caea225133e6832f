"""One pass over memory: gradients are read, and model parameters written, where Megatron has them.

Upstream's step of half-precision models is three passes: gradients are copied to fp32 main
gradients, the optimizer steps the main parameters, and those are copied to the model's.  Here the
optimizer is given the tensors at both ends.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    MixedPrecisionOptimizer,
)
from torch import Tensor

from megatron_s3.kernels.operands import local
from megatron_s3.mcore.arguments import needs_grad_norm
from megatron_s3.mcore.compat_before_0_19 import MainGradsForNorm
from megatron_s3.optimizers import ElementwiseOptimizer

__all__ = ["ElementwiseFloat16Optimizer", "OnePass", "Place", "is_plain", "place", "require_memory"]

#: A storage, an address in it and the storage's size.
Place = tuple[int, int, int]


class OnePass(MainGradsForNorm, MixedPrecisionOptimizer):  # type: ignore[misc]  # Megatron has no types
    """Comes before one of Megatron's mixed-precision optimizers in a class's bases.

    With ``fused=False`` in the optimizer, or where :meth:`_find_model_params` finds that a model
    parameter is not a plain tensor, everything is done as upstream does it.
    """

    optimizer: ElementwiseOptimizer

    #: Whether the step that is running writes the model's parameters.
    _writing = False
    #: Whether the optimizer was last given Megatron's own gradients.
    _grads_in_place = False
    #: What :attr:`_found` depends on.
    _found_for: tuple[Place, ...] | None = None
    _found: dict[Tensor, Tensor] | None = None

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Calls upstream's, after a look at where the model's parameters and gradients are by now.

        Raises:
            RuntimeError: they have been moved to where a step does not reach the model.  No
                parameter was changed.
        """
        self._locate()
        for grad in self._grad_memory():
            require_memory(grad, "gradients", "restore_grad_buffers")
        overflowed: bool = super().prepare_grads()
        return overflowed

    def step_with_ready_grads(self) -> bool:
        """Steps as upstream does, in one pass where that is possible."""
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
        # What unscales, clips, measures or counts gradients reads and writes ``.grad``, in fp32.
        config = self.config
        if not (
            self.optimizer.fused is False
            or self._holds_master_params()
            or self.grad_scaler
            or needs_grad_norm(config)
            or config.log_num_zeros_in_grad
        ):
            pairs = self._find_grads()
        # fp32 gradients are handed on without a copy by upstream, too.
        if pairs is None or all(grad is None or grad.dtype == torch.float32 for _, grad in pairs):
            super()._copy_model_grads_to_main_grads()
            return
        self._grads_in_place = True
        for main_param, grad in pairs:
            main_param.grad = None
            main_param.decoupled_grad = grad  # type: ignore[attr-defined]  # Megatron's name

    def get_grads_for_grad_norm(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Gives the main gradients, for a norm that a step may not need, and calls upstream's."""
        self.give_main_grads()
        grads: list[Tensor] = super().get_grads_for_grad_norm(*args, **kwargs)
        return grads

    def give_main_grads(self) -> None:
        """Copies the gradients to the main ones, where a step has not done so."""
        if self._grads_in_place:
            self._clear_decoupled_grads()
            super()._copy_model_grads_to_main_grads()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Calls upstream's, and lets go of gradients that are Megatron's own buffers."""
        super().zero_grad(set_to_none)
        self._clear_decoupled_grads()

    def _clear_decoupled_grads(self) -> None:
        if self._grads_in_place:
            for param in self.get_parameters():
                param.decoupled_grad = None
            self._grads_in_place = False

    def _locate(self) -> None:
        """Finds the model's parameters anew if one of them, or of the optimizer's, was moved."""
        if self._places() != self._found_for:
            self._found = self._find_model_params()
            self._found_for = self._places()  # after the search, which may put a shard back

    def _holds_master_params(self) -> bool:
        """Returns whether the optimizer has the model's parameters, and the main ones as state."""
        return bool(self.optimizer.host.master_params)

    def _places(self) -> tuple[Place, ...]:
        """Returns what changes when one of the tensors that a step writes to is moved."""
        raise NotImplementedError

    def _find_model_params(self) -> dict[Tensor, Tensor] | None:
        """Returns each main parameter's memory in the model; None where upstream's way is taken.

        Raises:
            RuntimeError: there is no memory, or the model does not read it.
        """
        raise NotImplementedError

    def _grad_memory(self) -> Iterable[Tensor]:
        """Returns tensors in whose memory all of the model's gradients are."""
        raise NotImplementedError

    def _find_grads(self) -> list[tuple[Tensor, Tensor | None]] | None:
        """Returns main parameters and gradients as Megatron has them; None for upstream's way."""
        raise NotImplementedError


# Megatron has no types.
class ElementwiseFloat16Optimizer(OnePass, Float16OptimizerWithFloat16Params):  # type: ignore[misc]
    """Megatron's optimizer of half-precision models without sharding, in one pass."""

    def _places(self) -> tuple[Place, ...]:
        return tuple(place(param) for group in self.float16_groups for param in group)

    def _find_model_params(self) -> dict[Tensor, Tensor] | None:
        found = {
            main: local(model.detach())  # under --use-torch-fsdp2 this rank's shard
            for models, mains in zip(
                self.float16_groups, self.fp32_from_float16_groups, strict=True
            )
            for model, main in zip(models, mains, strict=True)
        }
        for memory in filter(is_plain, found.values()):
            require_memory(memory, "parameters", "reload_from_cpu")
        return found if all(map(is_plain, found.values())) else None

    def _grad_memory(self) -> Iterable[Tensor]:
        groups = itertools.chain(self.float16_groups, self.fp32_from_fp32_groups)
        return (grad for group in groups for param in group if (grad := _grad(param)) is not None)

    def _find_grads(self) -> list[tuple[Tensor, Tensor | None]] | None:
        pairs = []
        for models, mains in zip(self.float16_groups, self.fp32_from_float16_groups, strict=True):
            for model, main in zip(models, mains, strict=True):
                pairs.append((main, _grad(model)))
        for params in self.fp32_from_fp32_groups:
            pairs += [(param, _grad(param)) for param in params]
        return pairs


def _grad(param: Tensor) -> Tensor | None:
    return param.main_grad if hasattr(param, "main_grad") else param.grad


def is_plain(tensor: Tensor) -> bool:
    """Returns whether its memory is its elements: no quantized, distributed or other kind."""
    return type(tensor.detach()) is Tensor and tensor.dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )


def place(tensor: Tensor) -> Place:
    """Returns where a tensor's elements (a DTensor's on this rank) are.

    An address alone does not say it: a storage that is given up and grown again keeps its views,
    and its old address may be another tensor's by then.
    """
    tensor = local(tensor)
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.data_ptr(), storage.nbytes()


def require_memory(tensor: Tensor, what: str, remedy: str) -> None:
    """Raises RuntimeError if the tensor's storage has been given up.

    Args:
        tensor: a plain or distributed one.
        what: its elements are, of the model.
        remedy: the method that allocates them again.
    """
    tensor = local(tensor)
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    if tensor.numel() and tensor.untyped_storage().nbytes() < needed:
        raise RuntimeError(
            f"the model's {what} of shape {tuple(tensor.shape)} have no memory now: it was given "
            f"up, as offloading does. Allocate it again ({remedy}) before the step. No parameter "
            "was changed."
        )
