"""Log lines about the optimizer that was built, written once by rank 0."""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_s3.kernels.choice import KERNELS
from megatron_s3.kernels.operands import local
from megatron_s3.log import say
from megatron_s3.mcore.arguments.readers import (
    hyperparameters,
    in_megatron_fsdp,
    state_dtypes,
    switches,
)
from megatron_s3.mcore.overrides import described
from megatron_s3.mcore.state import Training
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer
from megatron_s3.optimizers.description import Description
from megatron_s3.optimizers.host import Host

__all__ = ["announce", "announce_muon", "announce_parts", "say_path"]

_COLUMNS = ("pattern", "parameters", "optimizer", "lr", "weight_decay")


def announce(
    parts: list[MegatronOptimizer],
    cls: type[ElementwiseOptimizer],
    config: Any,
    training: Training,
) -> None:
    """Logs the optimizer with its settings, its parameters and state, and its step: three lines."""
    optimizers = [part.optimizer for part in parts]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    found = {d.name: d for optimizer in optimizers for d in optimizer.descriptions()}
    descriptions = list(found.values()) or [cls.description]
    for description in descriptions:
        own = [group for group in groups if group["algorithm"] == description.name]
        asked = hyperparameters(cls, config) | {"weight_decay": config.weight_decay}
        if description.name != cls.description.name:
            names = [h.name for h in description.hyperparameters] + ["weight_decay"]
            asked = {name: own[0][name] for name in names}
        settings = " ".join(
            f"{name}={_either(value, (group[name] for group in own))}"
            for name, value in asked.items()
        )
        say(f"{description.label} with {settings}")

    fractions = {name: of for d in descriptions for name, of in d.fractions.items()}
    dtypes = {n: dtype for optimizer in optimizers for n, dtype in optimizer.state_dtypes.items()}
    states = ", ".join(
        f"{name} {_name(dtype)}"
        + (f", as fractions of {fractions[name]}" if dtype == torch.int8 else "")
        for name, dtype in (dtypes or state_dtypes(cls, config)).items()
    )
    params = [param for group in groups for param in group["params"]]
    main = {
        _main(optimizer.host, param)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group["params"]
    }
    devices = {param.device.type for param in params}
    offloaded = ""
    if getattr(config, "optimizer_cpu_offload", False):
        count = sum(p.numel() for optimizer in optimizers for p in optimizer.host.offload.params)
        offloaded = f"; the CPU keeps and updates {count:,} of the parameters"
        devices.add("cpu")
    say(
        f"{sum(local(p).numel() for p in params):,} parameters of rank 0 in "
        f"{', '.join(sorted(main))}; optimizer state ({states}) "
        f"{' and '.join(sorted(set(map(_sharding, parts))))}{offloaded}"
    )

    paths = {
        _path(description, optimizers, device, config, training)
        for device in devices
        for description in descriptions
    }
    clipping = f"clip_grad={config.clip_grad:g}" if config.clip_grad > 0 else "no gradient clipping"
    say(f"step: {', '.join(sorted(paths))}; {clipping}")


def announce_parts(
    asked: Mapping[Any, Mapping[str, Any]],
    named: Sequence[tuple[str, torch.Tensor]],
    cls: type[ElementwiseOptimizer],
    config: Any,
) -> None:
    """Logs a table of patterns with their parameters, optimizers, learning rates and decays.

    Args:
        asked: the overrides in Megatron's form, see :mod:`megatron_s3.mcore.overrides`.
        named: the trainable parameters of rank 0 by name.
        cls: the optimizer of parameters for which no override names another.
        config: Megatron's OptimizerConfig.
    """
    # Megatron's own overrides have predicates; they hold for parameters of any optimizer.
    keys = [key for key in asked if key.name and not (key.predicate or key.with_name_predicate)]
    owned: dict[Any, list[tuple[str, torch.Tensor]]] = {key: [] for key in [*keys, None]}
    for name, param in named:
        for key in [key for key in keys if key.matches(param, name)] or [None]:
            owned[key].append((name, param))
    rows = []
    for key, own in owned.items():
        values = {} if key is None else asked[key]
        description = OPTIMIZERS[values.get("algorithm", cls.description.name)].description
        rows.append(
            (
                "all others" if key is None else _pattern_of(key),
                _count(own),
                description.label,
                _rates(own, asked, config) or str(values.get("max_lr", config.lr)),
                str(values.get("start_wd", config.weight_decay)),
            )
        )
    _say_table(rows)


def announce_muon(
    matrices: Sequence[tuple[str, torch.Tensor]],
    others: Sequence[tuple[str, torch.Tensor]],
    asked: Mapping[Any, Mapping[str, Any]],
    cls: type[ElementwiseOptimizer],
    config: Any,
) -> None:
    """Logs the table of :func:`announce_parts` for Muon and an optimizer of the plugin.

    Args:
        matrices: the parameters of rank 0 that Muon updates, by name.
        others: those that it leaves to the other.
        asked: the overrides in Megatron's form.
        cls: the other optimizer.
        config: Megatron's OptimizerConfig.
    """
    _say_table(
        [
            (what, _count(own), label, _rates(own, asked, config), str(config.weight_decay))
            for what, own, label in (
                ("matrices", matrices, "Muon"),
                ("all others", others, cls.description.label),
            )
        ]
    )


def _count(named: Sequence[tuple[str, torch.Tensor]]) -> str:
    return f"{sum(param.numel() for _, param in named):,}"


def _rates(
    named: Sequence[tuple[str, torch.Tensor]], asked: Mapping[Any, Mapping[str, Any]], config: Any
) -> str:
    """Returns the learning rates that parameters have, such as those of ``--decoupled-lr``."""
    found = (
        next(
            (v["max_lr"] for key, v in asked.items() if "max_lr" in v and key.matches(param, name)),
            config.lr,
        )
        for name, param in named
    )
    return " or ".join(map(str, dict.fromkeys(found)))


def _say_table(lines: Sequence[tuple[str, ...]]) -> None:
    rows = [_COLUMNS, *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        say("  ".join(cells).rstrip())


def _pattern_of(key: Any) -> str:
    names = (key.name,) if isinstance(key.name, str) else key.name
    return described(key) if key.attr else " ".join(names)


def _either(value: Any, found: Iterable[Any]) -> str:
    """Returns the configuration's value, and the values of param groups that have others."""
    others = [other for other in dict.fromkeys(found) if other != value]
    return " or ".join(map(str, [value, *others]))


def _sharding(part: MegatronOptimizer) -> str:
    if in_megatron_fsdp(part):
        strategy = part.ddp_config.data_parallel_sharding_strategy
        how = "not sharded" if strategy == "no_shard" else "sharded"
        return f"{how} by Megatron-FSDP ({strategy})"
    if isinstance(part, DistributedOptimizer):
        return f"sharded over {part.data_parallel_group.size()} data-parallel ranks"
    return "not sharded"


def _path(
    description: Description,
    optimizers: Sequence[ElementwiseOptimizer],
    device: str,
    config: Any,
    training: Training,
) -> str:
    """Returns what runs the step on a device, as far as settings determine it."""
    if switches(config)["plugin_no_fused"]:
        return f"torch operations on {device} (--plugin-no-fused)"
    if device not in KERNELS:
        reasons = {f"no kernel for {description.label} on {device}"}
    else:
        kernel = importlib.import_module(KERNELS[device])
        values = (
            optimizer.algorithm_of(group).group_hyperparameters(group | {"step": 1})
            for optimizer in optimizers
            for group in optimizer.param_groups
            if group["algorithm"] == description.name
        )
        reasons = {kernel.reason(description.rule, [], **each) for each in values}
        if len(reasons) != 1 or None in reasons:
            return f"{kernel.NAME} on {device}"
    (reason,) = reasons
    training.said.add(f"portable: {reason}")
    return f"torch operations on {device} ({reason})"


def _main(host: Host, param: torch.Tensor) -> str:
    """Returns the form in which the main parameter of one of the optimizer's is stored."""
    if host.keeps_remainder(param):
        return "bfloat16 with int16 remainders of float32"
    return _name(torch.float32 if host.master_params else param.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def say_path(optimizers: Sequence[ElementwiseOptimizer], training: Training) -> None:
    """Logs what ran the first update if it differs from the announcement."""
    paths = {optimizer.path for optimizer in optimizers if optimizer.path}
    training.updated = bool(paths)
    for path in sorted(paths - training.said):
        if "portable" in path and optimizers[0].fused is not False:
            part = "" if path.startswith("portable") else " in part"
            label = optimizers[0].label
            say(f"{label} is updated by torch operations{part} ({path})")
