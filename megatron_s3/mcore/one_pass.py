"""One pass over memory: gradients are read, and model parameters written, where Megatron has them.

Upstream's step of half-precision models is three passes: gradients are copied to fp32 main
gradients, the optimizer steps the main parameters, and those are copied to the model's.  Here the
optimizer is given the tensors at both ends.
"""

import torch
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    MixedPrecisionOptimizer,
)
from torch import Tensor

from megatron_s3.kernels.operands import local
from megatron_s3.mcore.arguments import needs_grad_norm
from megatron_s3.optimizers import ElementwiseOptimizer

__all__ = ["ElementwiseFloat16Optimizer", "OnePass", "is_plain"]


class OnePass(MixedPrecisionOptimizer):
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
    _found_for: tuple[int, ...] | None = None
    _found: dict[Tensor, Tensor] | None = None

    def step_with_ready_grads(self) -> bool:
        """As upstream, in one pass where that is possible."""
        model_params = self._model_params()
        self.optimizer.model_params = model_params or {}
        self._writing = model_params is not None
        try:
            return super().step_with_ready_grads()
        finally:
            self._writing = False

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
            main_param.decoupled_grad = grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As upstream; gradients that are Megatron's own buffers are let go of."""
        super().zero_grad(set_to_none)
        self._clear_decoupled_grads()

    def _clear_decoupled_grads(self) -> None:
        if self._grads_in_place:
            for param in self.get_parameters():
                param.decoupled_grad = None
            self._grads_in_place = False

    def _model_params(self) -> dict[Tensor, Tensor] | None:
        """For each main parameter the model's memory of it; None where upstream's way is taken."""
        if self.optimizer.fused is False or self._holds_master_params():
            return None
        pointers = self._pointers()
        if pointers != self._found_for:
            self._found_for, self._found = pointers, self._find_model_params()
        return self._found

    def _holds_master_params(self) -> bool:
        """Whether the optimizer's parameters are the model's, and the main ones its state."""
        return bool(self.optimizer.master_params)

    def _pointers(self) -> tuple[int, ...]:
        """Addresses that change when the model's parameters move."""
        raise NotImplementedError

    def _find_model_params(self) -> dict[Tensor, Tensor] | None:
        raise NotImplementedError

    def _find_grads(self) -> list[tuple[Tensor, Tensor | None]] | None:
        """Every main parameter and its gradient as Megatron has it; None for upstream's way."""
        raise NotImplementedError


class ElementwiseFloat16Optimizer(OnePass, Float16OptimizerWithFloat16Params):
    """Megatron's optimizer of half-precision models without sharding, in one pass."""

    def _pointers(self) -> tuple[int, ...]:
        return tuple(local(p.detach()).data_ptr() for group in self.float16_groups for p in group)

    def _find_model_params(self) -> dict[Tensor, Tensor] | None:
        found = {
            main: local(model.detach())  # under --use-torch-fsdp2 this rank's shard
            for models, mains in zip(
                self.float16_groups, self.fp32_from_float16_groups, strict=True
            )
            for model, main in zip(models, mains, strict=True)
        }
        return found if all(map(is_plain, found.values())) else None

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
    """Whether its memory is its elements: no quantized, distributed or other kind of tensor."""
    return type(tensor.detach()) is Tensor and tensor.dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )
