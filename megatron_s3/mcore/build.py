"""The optimizer that Megatron's trainer gets: built as Adam, then given another update rule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

from megatron_s3.mcore.arguments import as_adam, destination, say
from megatron_s3.mcore.distributed import sharded_class
from megatron_s3.mcore.update_log import UpdateLog
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer

__all__ = ["ElementwiseChainedOptimizer", "get_megatron_optimizer", "get_megatron_optimizer_config"]

_SWITCHES = ("s3_log_grad_norm", "s3_log_max_update")


def get_megatron_optimizer_config(original: Callable[..., Any], args: Any) -> Any:
    """Around the step from arguments to configuration: carries the optimizer's own flags over."""
    cls = OPTIMIZERS.get(args.optimizer)
    if cls is None:
        return original(args)
    with as_adam(args):  # before 0.18 it raises on a name it does not know
        result = original(args)
    config = result[0] if isinstance(result, tuple) else result
    config.optimizer = args.optimizer
    for name in (*(destination(cls.description, h) for h in _hyperparameters(cls)), *_SWITCHES):
        setattr(config, name, getattr(args, name))
    return result


def get_megatron_optimizer(
    original: Callable[..., MegatronOptimizer], config: Any, *args: Any, **kwargs: Any
) -> MegatronOptimizer:
    """Around Megatron's builder: every part of what it built as Adam gets the asked-for rule.

    The exchange comes after the building, so that parameter groups, main parameters, shards and
    loss scaling are Megatron's own in every release; Adam has allocated nothing by then.

    Hyperparameters are attributes of ``config`` named as the flags' destinations (``s3_beta``);
    missing ones take the optimizer's defaults.
    """
    cls = OPTIMIZERS.get(config.optimizer)
    if cls is None:
        return original(config, *args, **kwargs)
    with as_adam(config):
        built = original(config, *args, **kwargs)
    if not isinstance(built, ChainedOptimizer):  # a release that returns a single part as it is
        built = ChainedOptimizer([built])
    parts = [part for part in built.chained_optimizers if part.optimizer is not None]
    for part in parts:
        _exchange(part, cls, config)
    built.__class__ = ElementwiseChainedOptimizer
    built.update_log = None
    if getattr(config, "s3_log_max_update", False):
        built.update_log = UpdateLog([part.optimizer for part in parts])
    _announce(parts, cls, config)
    return built


def _exchange(part: MegatronOptimizer, cls: type[ElementwiseOptimizer], config: Any) -> None:
    adam = part.optimizer
    # What Adam added to its groups (betas, eps, ...) would read as settings of the new optimizer.
    adams_own = set(adam.defaults) - {"lr", "weight_decay"}
    groups = [
        {k: v for k, v in group.items() if k not in adams_own} | {"params": []}
        for group in adam.param_groups
    ]
    values = {}
    for h in _hyperparameters(cls):
        value = getattr(config, destination(cls.description, h), None)
        values[h.name] = h.default if value is None else value
    optimizer = cls(groups, lr=config.lr, weight_decay=config.weight_decay, **values)
    # fp32 shards are views of parameters, which torch refuses to new optimizers; as upstream does,
    # they are put in afterwards.
    for group, adams in zip(optimizer.param_groups, adam.param_groups, strict=True):
        group["params"] = adams["params"]
    optimizer.keep_hyperparameters = True
    # A checkpoint of a run that has not updated yet (fp16 skips its first steps) holds the state.
    optimizer.register_state_dict_pre_hook(ElementwiseOptimizer.init_state)
    part.optimizer = optimizer
    part.init_state_fn = _init_state
    if isinstance(part, DistributedOptimizer):
        part.__class__ = sharded_class(cls.description.state)


def _init_state(optimizer: ElementwiseOptimizer, config: Any = None) -> None:
    """Megatron's ``init_state_fn``."""
    optimizer.init_state()


class ElementwiseChainedOptimizer(ChainedOptimizer):
    """The whole optimizer of a trainer.

    Upstream's computes the global gradient norm each step, also where neither clipping nor a skip
    threshold needs it: 4 bytes a parameter, an all-reduce and a host synchronisation.  Here it is
    computed where something needs it, and else reported as None.
    """

    update_log: UpdateLog | None

    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        """As upstream; 0 (a number, which 0.18 compares with a threshold) where not needed."""
        return super().get_grad_norm() if self._needs_grad_norm() else 0.0

    @torch.no_grad()
    def step(self) -> tuple[bool, Any, Any]:
        """As upstream: whether the parameters were updated, gradient norm, number of zeros."""
        success, grad_norm, zeros = super().step()
        if self.update_log is not None:
            self.update_log.after_step()
        return success, grad_norm if self._needs_grad_norm() else None, zeros

    def _needs_grad_norm(self) -> bool:
        return bool(self.chained_optimizers) and (
            self.config.clip_grad > 0
            or math.isfinite(getattr(self.config, "grad_norm_skip_threshold", math.inf))
            or getattr(self.config, "s3_log_grad_norm", False)
        )


def _announce(parts: list[MegatronOptimizer], cls: type[ElementwiseOptimizer], config: Any) -> None:
    """One line: what was built, over how much, how."""
    params = [p for part in parts for g in part.optimizer.param_groups for p in g["params"]]
    sharding = {
        f"sharded over {part.data_parallel_group.size()} data-parallel ranks"
        if isinstance(part, DistributedOptimizer)
        else "not sharded"
        for part in parts
    }
    group = parts[0].optimizer.param_groups[0] if parts else {}
    settings = " ".join(f"{h.name}={group.get(h.name)}" for h in _hyperparameters(cls))
    say(
        f"{cls.description.label} with {settings} weight_decay={config.weight_decay}: "
        f"{sum(p.numel() for p in params):,} parameters of rank 0 in "
        f"{', '.join(sorted({str(p.dtype).removeprefix('torch.') for p in params}))}, state "
        f"({', '.join(cls.description.state)}) {' and '.join(sorted(sharding))}, portable path on "
        f"{', '.join(sorted({p.device.type for p in params}))}, "
        + (f"clip_grad={config.clip_grad:g}" if config.clip_grad > 0 else "no gradient clipping")
    )


def _hyperparameters(cls: type[ElementwiseOptimizer]) -> tuple[Any, ...]:
    return cls.description.hyperparameters
