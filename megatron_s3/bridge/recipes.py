"""Recipes for Megatron-Bridge: makes S3's configuration, or turns a recipe with Adam into S3."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from megatron.bridge.training.config import SchedulerConfig

from megatron_s3.bridge.configuration import S3OptimizerConfig
from megatron_s3.errors import MegatronS3Error
from megatron_s3.log import say
from megatron_s3.mcore.arguments.checks import check_config
from megatron_s3.mcore.arguments.names import flag_named
from megatron_s3.mcore.configuration import settle
from megatron_s3.optimizers import S3
from megatron_s3.paper import FLAGS, LR_FACTOR, Rules

__all__ = ["RecipeRefused", "distributed_s3_with_cosine_annealing", "use_s3"]


class RecipeRefused(MegatronS3Error, ValueError):
    """Raised if S3 cannot train a recipe; the message names setting, reason and what to do."""


def distributed_s3_with_cosine_annealing(
    precision: str = "bf16-mixed",
    lr_warmup_iters: int = 2000,
    lr_decay_iters: int | None = None,
    weight_decay: float = 0.01,
    max_lr: float = 1e-3,
    min_lr: float | None = None,
    lr_decay_style: str = "cosine",
    **settings: Any,
) -> tuple[S3OptimizerConfig, SchedulerConfig]:
    """Returns S3's configuration and its schedule.

    It is the counterpart of Bridge's ``distributed_fused_adam_with_cosine_annealing``, with 10
    times its learning rate and a tenth of its ``weight_decay``.  ``weight_decay`` is set in the
    optimizer and in the schedule, because Bridge's scheduler overwrites the optimizer's value.

    Args:
        precision: ``"bf16-mixed"``, ``"16-mixed"``, or another name of a precision in Bridge.
        lr_warmup_iters: number of iterations over which the learning rate increases.
        lr_decay_iters: number of iterations over which it decays; the whole training if None.
        weight_decay: coefficient of the weight decay.
        max_lr: the maximum learning rate.
        min_lr: the minimum learning rate; a tenth of ``max_lr`` if None.
        lr_decay_style: ``"cosine"``, ``"linear"``, ``"WSD"``, ...
        **settings: other fields of :class:`S3OptimizerConfig`, for instance ``s3_p=2.0``.

    Returns:
        The configurations of the optimizer and of the scheduler.

    Raises:
        TypeError: a setting is not a field.
    """
    optimizer = S3OptimizerConfig(
        lr=max_lr,
        min_lr=0.1 * max_lr if min_lr is None else min_lr,
        weight_decay=weight_decay,
        bf16=precision == "bf16-mixed",
        fp16=precision == "16-mixed",
        **{"use_distributed_optimizer": True} | settings,
    )
    scheduler = SchedulerConfig(
        start_weight_decay=weight_decay,
        end_weight_decay=weight_decay,
        weight_decay_incr_style="constant",
        lr_decay_style=lr_decay_style,
        lr_wsd_decay_style="minus_sqrt",
        lr_wsd_decay_iters=lr_decay_iters,
        lr_warmup_iters=lr_warmup_iters,
        lr_warmup_init=0.0,
        lr_decay_iters=lr_decay_iters,
        override_opt_param_scheduler=True,
    )
    optimizer.schedule = scheduler
    return optimizer, scheduler


def use_s3(config: Any, lr_factor: float = float(LR_FACTOR), **settings: Any) -> Any:
    """Turns a recipe that trains with Adam into one that trains with S3.

    The rules are those of ``megatron-s3 args``: learning rates are multiplied by 10, weight decays
    are divided by 10 so that lr * weight_decay stays constant, clipping is turned off, and Adam's
    betas and eps are dropped.  Each change is logged in a line.

    Args:
        config: the recipe, a ConfigContainer; its ``optimizer`` and ``scheduler`` are replaced.
            Call this function before you apply overrides of the command line, which are then
            settings of S3.
        lr_factor: the ratio of S3's learning rate to Adam's.
        **settings: other fields of :class:`S3OptimizerConfig`, for instance ``s3_p=2.0``.

    Returns:
        ``config``.

    Raises:
        RecipeRefused: S3 cannot train the recipe.  Nothing was changed.
        TypeError: a setting is not a field.  Nothing was changed.
    """
    if not 0 < lr_factor < math.inf:
        raise RecipeRefused(f"lr_factor={lr_factor!r} is not a positive number. Give another one.")
    _check(config)
    rules = Rules(f"{lr_factor:.15g}", S3.description.name)
    changes: list[str] = []
    fields = dict(_translated("optimizer", config.optimizer, rules, changes))
    optimizer = S3OptimizerConfig(**fields | settings)
    scheduler = dataclasses.replace(
        config.scheduler, **dict(_translated("scheduler", config.scheduler, rules, changes))
    )
    try:
        settle(copy.copy(optimizer))
        check_config(optimizer, config.ddp, S3)
    except ValueError as error:
        raise RecipeRefused(f"S3 cannot train this recipe: {error}") from None
    optimizer.schedule = scheduler
    config.optimizer, config.scheduler = optimizer, scheduler
    provider = type(getattr(config, "optimizer_config_override_provider", None))
    if provider.__module__.partition(".")[0] not in ("megatron", "builtins"):
        changes.append(
            f"optimizer_config_override_provider is a {provider.__name__}: learning rates and "
            "weight decays that it sets without reading them from the configuration are not "
            "changed. Multiply its rates, and divide its weight decays, by "
            f"{lr_factor:.15g}."
        )
    for change in changes:
        say(change)
    return config


def _check(config: Any) -> None:
    old = config.optimizer
    if old.optimizer != "adam":
        raise RecipeRefused(
            f"the recipe has optimizer.optimizer={old.optimizer!r}: only Adam can be turned into "
            "S3. Take a recipe with Adam, or set config.optimizer to an S3OptimizerConfig."
        )
    if hasattr(old, "provide"):
        raise RecipeRefused(
            f"the recipe's optimizer configuration is a {type(old).__name__}, which builds an "
            "optimizer of its own. Take a recipe with Megatron-Bridge's OptimizerConfig."
        )
    if not getattr(old, "decoupled_weight_decay", True):
        raise RecipeRefused(
            "the recipe has optimizer.decoupled_weight_decay=False: its weight decay is a part of "
            "Adam's gradient, for which S3 has no counterpart. Set it to True."
        )
    if old.lr is None:
        raise RecipeRefused(
            "the recipe has no optimizer.lr, of which S3's learning rate would be a multiple. Set "
            "it."
        )
    if any(cls.__name__ == "MegatronMIMOProvider" for cls in type(config.model).__mro__):
        raise RecipeRefused(
            "the recipe's model is a MegatronMIMOProvider, whose optimizers Megatron-Bridge builds "
            "without asking the configuration. Train it with Adam."
        )
    unknown = {f.name for f in dataclasses.fields(old)} - {
        f.name for f in dataclasses.fields(S3OptimizerConfig)
    }
    if unknown:
        raise RecipeRefused(
            f"the recipe's optimizer configuration is a {type(old).__name__}, which has "
            f"{', '.join(sorted(unknown))}: S3's configuration has no such field. Take a recipe "
            "with Megatron-Bridge's OptimizerConfig."
        )


def _translated(part: str, old: Any, rules: Rules, changes: list[str]) -> Iterator[tuple[str, Any]]:
    """Yields names and new values of a configuration's fields.

    Args:
        part: the name of the configuration in the recipe, for the log.
        old: the configuration.
        rules: the rules by which values change.
        changes: receives a line for each change.
    """
    for field in dataclasses.fields(old):
        name, flag = field.name, flag_named(field.name)
        value = getattr(old, name)
        if not field.init:
            continue
        if flag not in FLAGS or value is None:
            yield name, value
            continue
        text, reason = rules.new(flag, str(value))
        if text is None:
            continue
        new = text if isinstance(value, str) else float(text)
        if new != value:
            changes.append(f"{part}.{name} {value} -> {new}: {reason}")
        yield name, new
