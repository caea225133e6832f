"""ZeRO-1: an element-wise optimizer's state in Megatron-Core's DistributedOptimizer."""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_s3.mcore import shard_files
from megatron_s3.mcore.one_pass import OnePass, is_plain

__all__ = ["ElementwiseDistributedOptimizer", "sharded_class"]


class ElementwiseDistributedOptimizer(OnePass, DistributedOptimizer):
    """DistributedOptimizer around an :class:`~megatron_s3.optimizers.ElementwiseOptimizer`.

    Main parameters, shards, gradient reduction and parameter gathering are upstream's.  What is
    saved of the optimizer is named by its description, so that no checkpoint of it can be taken
    for Adam's.

    Under ``--use-precision-aware-optimizer`` the optimizer's parameters are shards of the model's,
    and the fp32 ones are ``master_param`` in its state, which upstream leaves to Transformer
    Engine's FusedAdam and knows by its methods.
    """

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """Names of the sharded state tensors (read by Megatron-Core from 0.19 on)."""
        return self.optimizer.description.state

    def _get_state_key_dtype(self, key: str) -> torch.dtype:
        return self.optimizer.state_dtypes.get(key, torch.float32)

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

    def _get_main_param_and_optimizer_states(self, model_param: Any) -> dict[str, Tensor]:
        group, order = self.model_param_group_index_map[model_param]
        param = self.optimizer.param_groups[group]["params"][order]
        # Tensors alone, as upstream: others may have left their own marks beside them.
        state = {k: v for k, v in self.optimizer.state[param].items() if isinstance(v, Tensor)}
        return {"param": state.pop("master_param", param), **state}

    @torch.no_grad()  # fp32 main parameters are views of the model's, which autograd guards
    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict) -> None:
        shard_files.note_unlike(self, model_param, tensors)
        for name, own in self._get_main_param_and_optimizer_states(model_param).items():
            if isinstance(tensors[name], Tensor):
                own.copy_(tensors[name])

    def _copy_model_params_to_main_params(self, *args: Any, **kwargs: Any) -> None:
        """As upstream; also where the optimizer holds the main parameters.

        Upstream does nothing there, as FusedAdam makes them in its first step; ours are there when
        state was asked for before.
        """
        if not self._holds_master_params():
            super()._copy_model_params_to_main_params(*args, **kwargs)
            return
        with self._master_params_as_main_params():
            super()._copy_model_params_to_main_params(*args, **kwargs)

    @contextlib.contextmanager
    def _master_params_as_main_params(self) -> Iterator[None]:
        """Inside, this looks as without ``--use-precision-aware-optimizer``."""
        self.optimizer.init_state()
        kept = self.shard_fp32_from_float16_groups, self.shard_fp32_groups
        state = self.optimizer.state
        # fp32 shards have one only in the CPU's memory (--optimizer-cpu-offload).
        self.shard_fp32_from_float16_groups, self.shard_fp32_groups = (
            [[state[shard].get("master_param", shard) for shard in group] for group in groups]
            for groups in (self.shard_float16_groups, self.shard_fp32_groups)
        )
        self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = False
        try:
            yield
        finally:
            self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
            self.shard_fp32_from_float16_groups, self.shard_fp32_groups = kept

    def _pointers(self) -> tuple[int, ...]:
        memory = [b.param_data for buffer in self.buffers for b in buffer.buckets]
        memory += [shard for group in self.shard_fp32_groups for shard in group]
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in memory)

    def _find_model_params(self) -> dict[Tensor, Tensor] | None:
        ddp, config = self.ddp_config, self.config
        if (
            getattr(ddp, "fp8_param_gather", False)
            or getattr(ddp, "fp4_param_gather", False)
            or getattr(config, "reuse_grad_buf_for_mxfp8_param_ag", False)
        ):
            return None
        found = {}
        for model, main in self._model_and_main_params():
            place = self._get_model_param_range_map(model)["gbuf_world_in_bucket"]
            buffer, _, bucket = self.model_param_gbuf_map[model]
            memory = self.buffers[buffer].buckets[bucket].param_data
            if memory is None or not is_plain(memory) or not is_plain(model):
                return None
            shard = memory.view(-1)[place.start : place.end]
            # fp32 main parameters are the model's memory, unless one of the two has been moved.
            if shard.data_ptr() != main.data_ptr():
                found[main] = shard
        return found

    def _find_grads(self) -> list[tuple[Tensor, Tensor | None]] | None:
        if all(buffer.grad_data.dtype == torch.float32 for buffer in self.buffers):
            return None
        pairs = []
        for model, main in self._model_and_main_params():
            place = self._get_model_param_range_map(model)["param"]
            pairs.append((main, model.main_grad.view(-1)[place.start : place.end]))
        return pairs

    def _model_and_main_params(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every model parameter that this rank has elements of, and its shard of the main one."""
        for all_models, all_mains in (
            (self.model_float16_groups, self.shard_fp32_from_float16_groups),
            (self.model_fp32_groups, self.shard_fp32_groups),
        ):
            for models, mains in zip(all_models, all_mains, strict=True):
                yield from zip(models, mains, strict=True)


_ADAMS = ("param", "exp_avg", "exp_avg_sq")


@functools.cache
def sharded_class(
    state: tuple[str, ...],
    base: type[ElementwiseDistributedOptimizer] = ElementwiseDistributedOptimizer,
) -> type[ElementwiseDistributedOptimizer]:
    """The class for an optimizer with these state tensors.

    Before 0.19 upstream's checkpoint code holds the names of Adam's as a literal in four methods;
    there the class gets those methods with the literal replaced, and nothing else changed.
    """
    methods = {}
    if not hasattr(DistributedOptimizer, "optimizer_state_keys"):
        for name, function in vars(DistributedOptimizer).items():
            if inspect.isfunction(function) and _ADAMS in function.__code__.co_consts:
                methods[name] = _with_constant(function, _ADAMS, ("param", *state))
    return type(base.__name__, (base,), methods)


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
