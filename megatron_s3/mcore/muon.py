"""Megatron's Muon, and an optimizer of the plugin for what Muon leaves to another."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_s3.mcore import compat_before_0_19
from megatron_s3.mcore.all_ranks import raise_first
from megatron_s3.mcore.announcement import announce_muon
from megatron_s3.mcore.arguments.checks import check_scalar
from megatron_s3.mcore.arguments.readers import scalar_optimizer
from megatron_s3.mcore.configuration import settle
from megatron_s3.mcore.coverage import Part, check, collected, model_groups, trainable
from megatron_s3.optimizers import ElementwiseOptimizer

__all__ = ["get_megatron_optimizer"]


def get_megatron_optimizer(
    original: Callable[..., MegatronOptimizer], config: Any, *args: Any, **kwargs: Any
) -> MegatronOptimizer:
    """Calls Megatron's builder, and checks and logs what Muon and an optimizer of the plugin own.

    Megatron calls :func:`~megatron_s3.mcore.build.build_part` for the parameters that Muon leaves
    to ``muon_scalar_optimizer``.  With any other configuration the builder is called alone.

    Raises:
        ValueError: a field of the configuration is not valid, the two cannot train this model
            together, or not exactly one of them updates a trainable parameter.  All ranks raise it
            before training.
    """
    cls = scalar_optimizer(config)
    if cls is None:
        return original(config, *args, **kwargs)
    settle(config)  # again, because a program may have set attributes since
    call = dict(zip(("model_chunks", "config_overrides"), args, strict=False)) | kwargs
    chunks = call["model_chunks"]
    named = trainable(chunks)
    sharded = check_scalar(config, cls)
    vectors = _vectors_of_experts(named) if sharded else []
    raise_first(
        f"--muon-scalar-optimizer {cls.description.name} with sharded states does not support "
        f"{vectors[0]}: Megatron shards no parameters of experts but matrices. Train without "
        "biases in experts (--disable-bias-linear), or without --use-distributed-optimizer."
        if vectors
        else None
    )
    with collected() as found, compat_before_0_19.leaves_to(cls.description.name, config):
        built = original(config, *args, **kwargs)
    _require_ours(found, cls)
    muons = list(_muons(built, {id(part.optimizer) for part in found}))
    asked = call.get("config_overrides") or {}
    check([*found, *muons], built, chunks, asked)
    owned = {id(param) for part in muons for group in part.groups for param in group}
    matrices, others = (
        [(name, param) for name, param in named if (id(param) in owned) is by_muon]
        for by_muon in (True, False)
    )
    announce_muon(matrices, others, asked, cls, config)
    return built


def _vectors_of_experts(named: Sequence[tuple[str, torch.Tensor]]) -> list[str]:
    """Returns the names of the parameters of experts that are no matrices."""
    return [n for n, param in named if not getattr(param, "allreduce", True) and param.dim() != 2]


def _require_ours(found: Sequence[Part], cls: type[ElementwiseOptimizer]) -> None:
    """Raises ValueError if Megatron has built another optimizer than ``muon_scalar_optimizer``."""
    for part in found:
        inner = part.optimizer.optimizer
        if inner is not None and not isinstance(inner, cls):
            raise ValueError(
                f"this release of Megatron does not support --muon-scalar-optimizer "
                f"{cls.description.name}: it has built {type(inner).__name__} for the parameters "
                "that Muon leaves. Leave the flag out, or use another release."
            )


def _muons(built: MegatronOptimizer, others: set[int]) -> Iterator[Part]:
    """Yields Muon's parts of what was built, with the parameters that they step on any rank."""
    for each in getattr(built, "chained_optimizers", [built]):
        if id(each) in others:
            continue
        if not isinstance(each, LayerWiseDistributedOptimizer):
            yield Part(each, groups := model_groups(each), [None] * len(groups))
            continue
        lists = (each.dp_cp_params_list or [], each.expt_dp_params_list or [])
        everywhere = list(itertools.chain.from_iterable(itertools.chain(*lists)))
        for part in each.chained_optimizers:  # one of Muon's
            own = itertools.chain.from_iterable(model_groups(part))
            yield Part(part, [list(dict.fromkeys([*everywhere, *own]))], [None])
