"""The direction of a conversion and its settings, read from the checkpoint."""

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_s3.checkpoints import groups
from megatron_s3.checkpoints.errors import ConvertError
from megatron_s3.checkpoints.transfer import ADAM, Settings, convertible, from_adam_of, short
from megatron_s3.mcore.arguments.names import flag
from megatron_s3.mcore.arguments.rules import OVERRIDES
from megatron_s3.optimizers import OPTIMIZERS, AdamW
from megatron_s3.optimizers.description import Description
from megatron_s3.optimizers.stamp import PATTERN

__all__ = ["settings"]


#: Defaults of Megatron's OptimizerConfig, to which a state is converted back.
_MEGATRONS_BETAS = (0.9, 0.999)

_ADAMS = (ADAM, AdamW.description.name)


def settings(
    objects: list[Any],
    to: str,
    lr_factor: float | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    sharded: bool = True,
) -> Settings:
    """Returns the settings of a conversion, read from the objects of a checkpoint.

    Args:
        objects: the param groups and arguments, as the checkpoint holds them.  Programs without
            Megatron's trainer save no arguments.
        to: the target, :data:`ADAM` or one of :func:`convertible`.
        lr_factor: the ratio of the other optimizer's learning rate to AdamW's; the default of its
            description if None.
        hyperparameters: hyperparameters of the target that differ from its defaults.
        sharded: whether the state is of the distributed optimizer, if no arguments say so.

    Raises:
        ConvertError: the state is of an optimizer that cannot be converted, or its param groups
            have different steps or betas.
        ValueError: a hyperparameter is out of its range.
    """
    found = [group for held in objects for group in groups.find(held)]
    args = next((a for held in objects for a in groups.arguments(held)), None)
    if args is None:
        args = _from_groups(found, sharded)
    if getattr(args, "no_save_optim", False) or not found:
        raise ConvertError(
            "it holds no optimizer state (--no-save-optim): its weights load into any optimizer "
            "without a conversion, with --no-load-optim"
        )
    _check_one(found, args)
    description = _whose(to, getattr(args, "optimizer", ADAM), found)
    steps = {step for held in objects for step in groups.steps(held)}
    if len(steps) != 1:
        raise ConvertError(
            f"its param groups have the step counts {sorted(steps)}, and one common count is "
            "expected; choose another iteration with --iteration"
        )
    betas = {found_betas for group in found if (found_betas := groups.betas(group))}
    if len(betas) > 1:
        raise ConvertError(
            f"its param groups have different betas, {sorted(betas)}, and one pair for all groups "
            "is expected; choose another iteration with --iteration"
        )
    values = {h.name: h.default for h in description.hyperparameters} | dict(hyperparameters or {})
    for h in description.hyperparameters:
        h.check(values[h.name], flag(description, h))
    own = from_adam_of(description)
    default = own.lr_factor_back if to == ADAM else own.lr_factor
    return Settings(
        description=description,
        back=to == ADAM,
        step=steps.pop(),
        betas=betas.pop() if betas else (args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
        lr_factor=default if lr_factor is None else lr_factor,
        hyperparameters=values,
        sharded=args.use_distributed_optimizer,
    )


def _from_groups(found: list[dict[str, Any]], sharded: bool) -> argparse.Namespace:
    """Returns what is read here of a run's arguments, as its param groups have it."""
    first = found[0] if found else {}
    beta1, beta2 = _MEGATRONS_BETAS
    return argparse.Namespace(
        optimizer=first.get("algorithm", ADAM),
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_eps=first.get("eps", 1e-8),
        use_distributed_optimizer=sharded,
    )


def _check_one(found: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Raises ConvertError if parameters of the model have optimizers or settings of their own."""
    # Only the plugin's optimizers name themselves.
    written = getattr(args, "optimizer", ADAM)
    megatrons = ADAM if written in OPTIMIZERS else written
    names = list(dict.fromkeys(group.get("algorithm", megatrons) for group in found))
    rules = getattr(args, OVERRIDES, None)
    if len(names) > 1 or rules or any(PATTERN in group for group in found):
        several = " and ".join(names) if len(names) > 1 else " ".join(map(repr, rules or ()))
        raise ConvertError(
            "its parameters have optimizers or settings of their own"
            f"{f' ({several})' if several else ''}, and a conversion is of one optimizer for all "
            "parameters. Load its weights alone, with --no-load-optim"
        )


def _whose(to: str, written: str, found: list[dict[str, Any]]) -> Description:
    """Returns the description of the optimizer that is not AdamW.

    Raises:
        ConvertError: the checkpoint's optimizer is not one that the conversion starts from.
    """
    known = convertible()
    stamps = {group.get("algorithm", ADAM) for group in found}
    if written == to or to in stamps:
        raise ConvertError(
            f"its state is of --optimizer {to} already, which resumes from it without a conversion"
        )
    allowed = _ADAMS if to != ADAM else tuple(known)
    if written not in allowed or not stamps <= ({written} if to == ADAM else set(allowed)):
        labels = " nor ".join(f"{short(d)}'s" for d in (AdamW.description, *known.values()))
        raise ConvertError(
            f"it was saved by --optimizer {written}, whose state is neither {labels}. Load its "
            "weights alone, with --no-load-optim"
        )
    if any(group.get("decoupled_weight_decay") is False for group in found):
        raise ConvertError(
            "its optimizer is Adam with weight decay in the gradient, not AdamW, and its state "
            "cannot be converted. Load its weights alone, with --no-load-optim"
        )
    return known[written if to == ADAM else to]
