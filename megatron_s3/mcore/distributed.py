"""ZeRO-1: an element-wise optimizer's state in Megatron-Core's DistributedOptimizer."""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_s3.mcore import compat_before_0_19
from megatron_s3.mcore.checkpoint import param_groups, shards
from megatron_s3.mcore.one_pass import OnePass, Place, is_plain, place, require_memory
from megatron_s3.optimizers import ElementwiseOptimizer
from megatron_s3.optimizers.description import Description
from megatron_s3.optimizers.values import excess, main_param_of, put, put_main_param, values

__all__ = ["ElementwiseDistributedOptimizer", "names_in_shards", "sharded_class"]


def _mended(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the method of DistributedOptimizer of a wrapper's name, wrapped once.

    Megatron's own method is wrapped, whether or not the plugin has been registered.
    """

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        upstreams = inspect.unwrap(getattr(DistributedOptimizer, wrapper.__name__))
        return wrapper(upstreams, self, *args, **kwargs)

    return method


# Megatron has no types.
class ElementwiseDistributedOptimizer(OnePass, DistributedOptimizer):  # type: ignore[misc]
    """DistributedOptimizer around an :class:`~megatron_s3.optimizers.ElementwiseOptimizer`.

    Main parameters, shards, gradient reduction and parameter gathering are Megatron's. The names of
    the saved state come from the optimizer's description, or from the descriptions of its groups'
    algorithms (:func:`names_in_shards`), so its checkpoints cannot be mistaken for Adam's.

    Under ``--use-precision-aware-optimizer`` the optimizer's parameters are shards of the model's,
    and its state holds the fp32 ones as ``master_param``, or with ``store_param_remainders`` what
    bf16 ones lack of them. Megatron leaves this to Transformer Engine's FusedAdam and recognizes it
    by its methods. Checkpoints hold values, in whatever form the state is stored.
    """

    shard_fp32_from_float16_groups: list[list[Tensor]]
    shard_fp32_groups: list[list[Tensor]]

    #: Whether all ranks have made their state, which a rank without elements cannot see in it.
    _made = False

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """The names of the sharded state tensors (read by Megatron-Core from 0.19 on)."""
        return names_in_shards(self.optimizer)

    def _get_state_key_dtype(self, key: str) -> torch.dtype:
        for description in self.optimizer.descriptions():
            for name, own in zip(self.optimizer_state_keys, description.state, strict=False):
                if name == key:
                    dtype: torch.dtype = self.optimizer.state_dtypes[own]
                    return torch.bfloat16 if dtype == torch.int8 else dtype
        return torch.float32

    def state_dict(self) -> dict[str, Any]:
        """Returns the part that is equal on all data-parallel ranks: param groups and loss scale.

        Megatron's method reads torch AdamW's ``step`` from every parameter's state, which does not
        exist here.
        """
        saved = self.optimizer.saved_groups()
        if any("steps" in group for group in saved["param_groups"]):
            raise RuntimeError(
                f"{self.optimizer.description.label}: some parameters of this rank had no "
                "gradient in some steps, so their number of updates differs, and sharded "
                "checkpoints of the distributed optimizer cannot store it. Give every parameter "
                "a gradient (of zeros)."
            )
        groups = [{k: v for k, v in g.items() if k != "params"} for g in saved["param_groups"]]
        state_dict: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler:
            state_dict["grad_scaler"] = self.grad_scaler.state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Calls Megatron's method when the state exists; it would allocate Adam's names."""
        self.optimizer.init_state()
        _mended(param_groups.load_state_dict)(self, state_dict)
        for state in self.optimizer.state.values():
            state.pop("step", None)  # set by Megatron if it loads without FusedAdam
        self.name_main_params()

    # What megatron-core saves is mended here too, so that it is right where nothing is wrapped.
    get_parameter_state_dp_reshardable = _mended(shards.get_parameter_state_dp_reshardable)
    sharded_param_state_dp_reshardable = _mended(shards.sharded_param_state_dp_reshardable)
    sharded_param_state_fully_reshardable = _mended(shards.sharded_param_state_fully_reshardable)

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Calls Megatron's method after the main parameters in the optimizer's state exist."""
        if self._holds_master_params():
            self._make_state()
            self.name_main_params()
        return super().prepare_grads()

    def offload_to_cpu(self) -> None:
        """Calls Megatron's method.

        Raises:
            RuntimeError: a CUDA graph may hold the addresses of tensors that would be moved.
        """
        if getattr(self.config, "optimizer_cuda_graph", False):
            raise RuntimeError(
                "offload_to_cpu would move tensors to which the CUDA graph of "
                "optimizer_cuda_graph keeps writing. Leave one of the two out. Nothing was moved."
            )
        super().offload_to_cpu()
        self.name_main_params()

    def restore_from_cpu(self) -> None:
        """Calls Megatron's method; tensors that the CPU keeps and updates stay there."""
        with self._without_the_cpus_states():
            super().restore_from_cpu()
        self.name_main_params()

    @contextlib.contextmanager
    def _without_the_cpus_states(self) -> Iterator[None]:
        offload, state = self.optimizer.host.offload, self.optimizer.state
        kept = {}
        if offload is not None:
            kept = {param: state.pop(param) for param in offload.params if param in state}
        try:
            yield
        finally:
            state.update(kept)

    def _make_state(self) -> None:
        """Makes the state, where all ranks do so."""
        self.optimizer.init_state()
        self._made = True

    def name_main_params(self) -> None:
        """Sets ``main_param`` of half-precision parameters to the optimizer's ``master_param``.

        Megatron does so with main parameters of its own, for the norm of all parameters for
        example. Before the main parameters exist, the attribute is missing on every rank, and the
        parameter itself is used, and so it is with remainders.
        """
        if not self._holds_master_params():
            return
        state = self.optimizer.state
        mains = {
            model: state[shard].get("master_param") if shard in state else None
            for models, shards in zip(
                self.model_float16_groups, self.shard_float16_groups, strict=True
            )
            for model, shard in zip(models, shards, strict=True)
        }
        made = None not in mains.values() if mains else self._made
        made = made and not self.optimizer.host.remainders
        for param in (param for buffer in self.buffers for param in buffer.params):
            if made and param in mains:
                param.main_param = mains[param]
            elif hasattr(param, "main_param_sharded"):
                param.main_param = None  # of a parameter that other ranks keep
                if not made:
                    del param.main_param

    def _get_main_param_and_optimizer_states(self, model_param: Any) -> dict[str, Tensor]:
        description, param = self._owned(model_param)
        own, names = description.state, self.optimizer_state_keys
        # Megatron adds a step if it loads without FusedAdam.
        state = values(description, param, self.optimizer.state[param])
        tensors = {"param": state.get("master_param", param)}
        tensors |= {name: state[each] for name, each in zip(names, own, strict=False)}
        for name in names[len(own) :]:  # states of another algorithm, at the end
            dtype = self._get_state_key_dtype(name)
            tensors[name] = torch.zeros_like(param, dtype=dtype, device=state[own[0]].device)
        return tensors

    def _owned(self, model_param: Any) -> tuple[Description, Tensor]:
        """Returns the optimizer's parameter for one of the model's, and its description.

        Its state exists before any format reads or fills it, also before the first step.
        """
        number, order = self.model_param_group_index_map[model_param]
        group = self.optimizer.param_groups[number]
        description, param = self.optimizer.algorithm_of(group).description, group["params"][order]
        if not self.optimizer.state[param].keys() >= set(description.state):
            self.optimizer.init_state()
        return description, param

    @torch.no_grad()  # fp32 main parameters are views of the model's, which autograd protects
    def _set_main_param_and_optimizer_states(
        self, model_param: Any, tensors: dict[str, Any]
    ) -> None:
        shards.note_unlike(self, model_param, tensors)
        description, param = self._owned(model_param)
        state = self.optimizer.state[param]
        names = {"param": "master_param"} | dict(
            zip(self.optimizer_state_keys, description.state, strict=False)
        )
        given = {
            own: tensors[name] for name, own in names.items() if isinstance(tensors[name], Tensor)
        }
        for name in description.fractions.keys() & given.keys():
            if state[name].dtype != torch.int8:
                continue
            if fault := excess(description, name, given):
                raise ValueError(
                    f"{description.label}: the {name} of a parameter of shape "
                    f"{tuple(model_param.shape)} in the checkpoint {fault}."
                )
        if "master_param" in given and "master_param" not in state:
            param.copy_(given["master_param"])
        put(description, param, state, given)

    def _copy_model_params_to_main_params(self, *args: Any, **kwargs: Any) -> None:
        """Calls Megatron's method, also if the optimizer holds the main parameters.

        Megatron does nothing in this case, because FusedAdam creates them in its first step; here
        they exist as soon as the state was requested.
        """
        if not self._holds_master_params():
            super()._copy_model_params_to_main_params(*args, **kwargs)
            return
        with self._master_params_as_main_params():
            self.name_main_params()
            super()._copy_model_params_to_main_params(*args, **kwargs)

    @contextlib.contextmanager
    def _master_params_as_main_params(self) -> Iterator[None]:
        """Hides ``--use-precision-aware-optimizer`` from Megatron, inside a ``with``."""
        self._make_state()
        kept = self.shard_fp32_from_float16_groups, self.shard_fp32_groups
        state, mains = self.optimizer.state, {}
        for shard in itertools.chain(*self.shard_float16_groups, *self.shard_fp32_groups):
            # fp32 shards have a master_param only in the CPU's memory (--optimizer-cpu-offload).
            mains[shard] = main_param_of(shard, state[shard])
        self.shard_fp32_from_float16_groups, self.shard_fp32_groups = (
            [[mains[shard] for shard in group] for group in groups]
            for groups in (self.shard_float16_groups, self.shard_fp32_groups)
        )
        self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = False
        try:
            yield
        finally:
            self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
            self.shard_fp32_from_float16_groups, self.shard_fp32_groups = kept
        for shard, main in mains.items():
            put_main_param(shard, state[shard], main)

    def _places(self) -> tuple[Place, ...]:
        memory = [b.param_data for buffer in self.buffers for b in buffer.buckets]
        for pair in self.model_and_own_params():
            memory += pair
        return tuple(place(tensor) for tensor in memory if tensor is not None)

    @torch.no_grad()
    def _find_model_params(self) -> dict[Tensor, Tensor] | None:
        ddp, config = self.ddp_config, self.config
        if (
            getattr(ddp, "fp8_param_gather", False)
            or getattr(ddp, "fp4_param_gather", False)
            or getattr(config, "reuse_grad_buf_for_mxfp8_param_ag", False)
        ):
            return None
        found = {}
        for model, own in self.model_and_own_params():
            ranges = self._get_model_param_range_map(model)
            inside, shard = ranges["gbuf_world_in_bucket"], ranges["param"]
            buffer, _, bucket = self.model_param_gbuf_map[model]
            memory = self.buffers[buffer].buckets[bucket].param_data
            if memory is None or not is_plain(memory) or not is_plain(model):
                return None
            require_memory(memory, "parameters", "reload_from_cpu")
            memory, first = memory.view(-1), inside.start - shard.start
            if place(model) != place(memory[first:]):
                raise RuntimeError(
                    f"the model's parameter of shape {tuple(model.shape)} is no longer in the "
                    "buffer in which Megatron gathers parameters, so no update would reach it "
                    "(model.to, or another assignment to its data). Move the buffers instead, "
                    "with their offload_to_cpu and reload_from_cpu, or build "
                    "DistributedDataParallel and the optimizer after the move. No parameter was "
                    "changed."
                )
            memory = memory[inside.start : inside.end]
            if place(own) == place(memory):  # of fp32 parameters, and of copies
                continue
            if not self._holds_master_params():
                found[own] = memory
                continue
            if "master_param" not in self.optimizer.state[own] and own.dtype == torch.float32:
                memory.copy_(own)  # it is itself the main parameter
            own.data = memory
        return found

    def _find_grads(self) -> list[tuple[Tensor, Tensor | None]] | None:
        if all(buffer.grad_data.dtype == torch.float32 for buffer in self.buffers):
            return None
        pairs = []
        for model, main in self.model_and_own_params():
            place = self._get_model_param_range_map(model)["param"]
            grad = model.main_grad  # type: ignore[attr-defined]  # Megatron's name
            pairs.append((main, grad.view(-1)[place.start : place.end]))
        return pairs

    def _grad_memory(self) -> Iterable[Tensor]:
        return (buffer.grad_data for buffer in self.buffers)

    def model_and_own_params(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the model's parameters with elements on this rank, each with the optimizer's."""
        halves = self.shard_fp32_from_float16_groups
        if self._holds_master_params():
            halves = self.shard_float16_groups
        for all_models, all_own in (
            (self.model_float16_groups, halves),
            (self.model_fp32_groups, self.shard_fp32_groups),
        ):
            for models, own in zip(all_models, all_own, strict=True):
                yield from zip(models, own, strict=True)


def names_in_shards(optimizer: ElementwiseOptimizer) -> tuple[str, ...]:
    """Returns the names under which an optimizer's sharded states are saved.

    They are the names of its states.  If its groups have several algorithms, a state is saved by
    its position, because a bucket of Megatron's has one set of names for all of its parameters:
    the name is then made of the names at this position (``exp_pnorm_or_exp_avg_sq``).
    """
    states = [description.state for description in optimizer.descriptions()]
    return tuple(
        "_or_".join(dict.fromkeys(name for name in names if name is not None))
        for names in itertools.zip_longest(*states)
    )


@functools.cache
def sharded_class(
    state: tuple[str, ...],
    base: type[ElementwiseDistributedOptimizer] = ElementwiseDistributedOptimizer,
) -> type[ElementwiseDistributedOptimizer]:
    """Returns the subclass for an optimizer whose state tensors are saved by these names."""
    older = compat_before_0_19.needed()
    methods = compat_before_0_19.methods_that_name(state) if older else {}
    return type(base.__name__, (base,), methods)
