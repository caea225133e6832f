"""Wraps Megatron's validation of arguments: the plugin's checks run first."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from megatron_s3.log import say
from megatron_s3.mcore.arguments.checks import (
    check_clip_grad,
    check_device,
    check_megatron_fsdp,
    check_memory,
    check_metrics,
    check_scalar,
    check_several,
    refuse_flags_of,
)
from megatron_s3.mcore.arguments.flags import Default, without_effect
from megatron_s3.mcore.arguments.mask import as_adam
from megatron_s3.mcore.arguments.names import (
    STATE_DTYPES,
    destination,
    dtype_name,
    dtype_of,
    flag,
    flag_named,
)
from megatron_s3.mcore.arguments.readers import hyperparameters, scalar_optimizer
from megatron_s3.mcore.arguments.rules import OVERRIDES
from megatron_s3.mcore.refusal import Refused
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer
from megatron_s3.optimizers.description import FORMAT, Description

__all__ = ["UNSUPPORTED", "validate_args"]

#: Arguments that the plugin's optimizers do not support: destination, flag, reason.
UNSUPPORTED = (("yaml_cfg", "--yaml-cfg", "its flags are checked on the command line only"),)


def validate_args(
    original: Callable[..., Any], args: argparse.Namespace, *rest: Any, **more: Any
) -> Any:
    """Wraps Megatron's validation: the plugin's checks run first, then Megatron's as for adam.

    Raises:
        Refused: a check of the plugin fails; the message names the flag, the reason and what to do.
    """
    theirs: list[ValueError] = []

    def asked(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except ValueError as error:
            theirs.append(error)
            raise

    try:
        return _validate(asked, args, *rest, **more)
    except ValueError as error:
        if error in theirs:
            raise
        raise Refused(str(error)) from None


def _validate(
    original: Callable[..., Any], args: argparse.Namespace, *rest: Any, **more: Any
) -> Any:
    defaults = args.__dict__.pop("_s3_upstream_defaults", {})
    clip_grad_given = not isinstance(args.clip_grad, Default)
    args.s3_format = FORMAT  # saved with the arguments
    check_device(args)
    if getattr(args, "rampup_batch_size", None) and hasattr(args, "step_batch_size_schedule"):
        raise ValueError(
            f"--rampup-batch-size {' '.join(map(str, args.rampup_batch_size))} has no effect in "
            "this release of Megatron: every batch would be of the full size. Give "
            "--step-batch-size-schedule instead, or leave it out."
        )
    scalar = scalar_optimizer(args)
    for other in OPTIMIZERS.values():
        if other.description.name != args.optimizer and other is not scalar:
            refuse_flags_of(other.description, args, defaults)
    cls = OPTIMIZERS.get(args.optimizer)
    if scalar is not None:
        _settle_own(args, scalar)
        check_scalar(args, scalar)
    if cls is None:
        for name in (*without_effect(scalar), OVERRIDES):
            if getattr(args, name, None):
                raise ValueError(
                    f"{flag_named(name)} does nothing with --optimizer {args.optimizer}: it is "
                    f"for the plugin's optimizers ({', '.join(OPTIMIZERS)}). Leave it out."
                )
        check_metrics(args)
        args.clip_grad = float(args.clip_grad)
        return original(args, *rest, **more)

    _check_own(args, cls)
    check_overrides(args)
    _say_what_has_no_effect(args, cls.description, defaults)
    if not clip_grad_given:
        args.clip_grad = cls.description.clip_grad
    elif args.clip_grad != cls.description.clip_grad:
        say(
            f"gradients are clipped at {args.clip_grad} (--clip-grad); the default of "
            f"--optimizer {cls.description.name} is {cls.description.clip_grad:g}"
        )
    with as_adam(args):
        result = original(args, *rest, **more)
    if getattr(args, "use_megatron_fsdp", False):
        check_megatron_fsdp(args)
    return result


def _check_own(args: argparse.Namespace, cls: type[ElementwiseOptimizer]) -> None:
    """Sets hyperparameters that were not given to their defaults, and checks the arguments."""
    description = cls.description
    _settle_own(args, cls)
    check_clip_grad(args.clip_grad, "--clip-grad")
    for name, unsupported, reason in UNSUPPORTED:
        if getattr(args, name, False):
            raise ValueError(
                f"--optimizer {description.name} does not support {unsupported}: {reason}. Leave "
                f"{unsupported} out, or train with --optimizer adam."
            )
    check_metrics(args)
    if getattr(args, "use_megatron_fsdp", False) and (
        getattr(args, "megatron_fsdp_version", 1) == 2  # from main of 2026 on
    ):
        raise ValueError(
            f"--optimizer {description.name} does not support --megatron-fsdp-version 2: it steps "
            "by Megatron's DistributedOptimizer, which version 2 does without. Leave it out (1), "
            "or give --use-torch-fsdp2 instead of --use-megatron-fsdp."
        )
    check_memory(args, cls)


def _settle_own(args: argparse.Namespace, cls: type[ElementwiseOptimizer]) -> None:
    description = cls.description
    for h in description.hyperparameters:
        name = destination(description, h)
        if getattr(args, name) is None:
            setattr(args, name, h.default)
        h.check(getattr(args, name), flag(description, h))
    # What the optimizer itself refuses, such as two options that exclude each other.
    cls([torch.zeros(1)], lr=0.0, **hyperparameters(cls, args))


def check_overrides(args: argparse.Namespace) -> None:
    """Raises ValueError if the rules of ``--plugin-overrides`` are not valid for the arguments."""
    from megatron_s3.mcore import overrides  # it imports Megatron, which a bad device must not

    cls = OPTIMIZERS[args.optimizer]
    classes = overrides.algorithms(
        overrides.translated(overrides.with_rules({}, args) or {}, cls, args), cls
    )
    check_several(args, args, classes)
    for each in classes[1:]:
        check_memory(args, each)


def _say_what_has_no_effect(
    args: argparse.Namespace, description: Description, defaults: dict[str, Any]
) -> None:
    own = {destination(description, h) for h in description.hyperparameters}
    given = [
        (name, getattr(args, name, default))
        for name, default in defaults.items()
        if name not in own and getattr(args, name, default) != default
    ]
    for name in STATE_DTYPES[len(description.state) :]:
        dtype = dtype_of(getattr(args, name, torch.float32))
        if args.use_precision_aware_optimizer and dtype != torch.float32:
            given.append((name, dtype_name(dtype)))
    for name, value in given:
        say(f"{flag_named(name)} {value} has no effect with --optimizer {description.name}")
