"""Flags: those of the plugin's optimizers, their validation, and what is refused with them."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from megatron_s3.mcore import cpu_device
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.optimizers.description import Description, Hyperparameter

__all__ = [
    "DEVICES",
    "add_megatron_arguments",
    "as_adam",
    "destination",
    "flag",
    "print_args",
    "say",
    "validate_args",
]

#: Values of ``--s3-device``.
DEVICES = ("auto", "cuda", "cpu")

#: Arguments that the plugin's optimizers do not support yet: destination, flag, reason.
UNSUPPORTED = (
    (
        "use_precision_aware_optimizer",
        "--use-precision-aware-optimizer",
        "its states are kept in fp32; low-precision states are not implemented yet",
    ),
    (
        "optimizer_cpu_offload",
        "--optimizer-cpu-offload",
        "Megatron's hybrid device optimizer knows Adam and SGD only",
    ),
    ("use_megatron_fsdp", "--use-megatron-fsdp", "its state is not sharded by Megatron-FSDP yet"),
    ("use_torch_fsdp2", "--use-torch-fsdp2", "its state is not sharded by torch FSDP2 yet"),
    (
        "optimizer_cuda_graph",
        "--optimizer-cuda-graph",
        "its step reads the learning rate on the host",
    ),
    ("yaml_cfg", "--yaml-cfg", "its flags are checked on the command line only"),
)

#: Other defaults of Megatron's flags where it trains on the CPU: its own name GPU kernels.
CPU_DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}

#: Flags of Megatron's own optimizers that have no effect under another one.
_OF_OTHER_OPTIMIZERS = ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum")


class _Default(float):
    """A default value that can be told from the same number given by the user."""


def flag(description: Description, hyperparameter: Hyperparameter) -> str:
    """The command-line flag of an optimizer's hyperparameter, such as ``--s3-beta``."""
    negation = "no-" if hyperparameter.default is True else ""
    return f"--{description.name}-{negation}{hyperparameter.name}".replace("_", "-")


def destination(description: Description, hyperparameter: Hyperparameter) -> str:
    """Its name in Megatron's arguments and optimizer configuration, such as ``s3_beta``."""
    return f"{description.name}_{hyperparameter.name}".replace("-", "_")


def add_megatron_arguments(
    original: Callable[..., Any], parser: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """Around Megatron's parser: more choices for ``--optimizer``, and the plugin's own flags."""
    parser = original(parser)
    known = parser._option_string_actions
    known["--optimizer"].choices = [*known["--optimizer"].choices, *OPTIMIZERS]
    known["--clip-grad"].default = _Default(known["--clip-grad"].default)
    if cpu_device.active():
        here = {action.dest for action in known.values()}
        parser.set_defaults(**{k: v for k, v in CPU_DEFAULTS.items() if k in here})

    group = parser.add_argument_group("megatron_s3")
    group.add_argument(
        "--s3-device",
        choices=DEVICES,
        default="auto",
        help="where to train; auto takes the CPU, with gloo, where there is no GPU",
    )
    group.add_argument(
        "--s3-log-grad-norm",
        action="store_true",
        help="compute and log the gradient norm although nothing needs it: a pass over the "
        "gradients, an all-reduce and a host synchronisation each step",
    )
    group.add_argument(
        "--s3-log-max-update",
        action="store_true",
        help="log the largest |update| of each logging interval to TensorBoard (update/max_abs)",
    )
    for cls in OPTIMIZERS.values():
        description = cls.description
        group = parser.add_argument_group(description.label)
        for h in description.hyperparameters:
            kind: dict[str, Any] = (
                {"action": "store_const", "const": not h.default}
                if h.is_switch
                else {"type": float, "metavar": "X"}
            )
            # None until validated, so that a flag can be seen to have been given.
            group.add_argument(
                flag(description, h),
                dest=destination(description, h),
                default=None,
                help=f"{'do not: ' if h.default is True else ''}{h.help} (default {h.default})",
                **kind,
            )
    parser.set_defaults(
        _s3_upstream_defaults={name: parser.get_default(name) for name in _OF_OTHER_OPTIMIZERS}
    )
    return parser


def validate_args(
    original: Callable[..., Any], args: argparse.Namespace, *rest: Any, **more: Any
) -> Any:
    """Around Megatron's validation: ours first, then Megatron's as it treats adam.

    Raises:
        ValueError: naming the flag, the reason and what to do.
    """
    defaults = args.__dict__.pop("_s3_upstream_defaults", {})
    clip_grad_given = not isinstance(args.clip_grad, _Default)
    _check_device(args)
    for other in OPTIMIZERS.values():
        if other.description.name != args.optimizer:
            _refuse_flags_of(other.description, args)
    cls = OPTIMIZERS.get(args.optimizer)
    if cls is None:
        for name in ("s3_log_grad_norm", "s3_log_max_update"):
            if getattr(args, name):
                known = ", ".join(OPTIMIZERS)
                raise ValueError(
                    f"--{name.replace('_', '-')} does nothing with --optimizer {args.optimizer}: "
                    f"it is for the plugin's optimizers ({known}). Leave it out."
                )
        args.clip_grad = float(args.clip_grad)
        return original(args, *rest, **more)

    description = cls.description
    for h in description.hyperparameters:
        name = destination(description, h)
        if getattr(args, name) is None:
            setattr(args, name, h.default)
        h.check(getattr(args, name), flag(description, h))
    for name, unsupported, reason in UNSUPPORTED:
        if getattr(args, name, False):
            raise ValueError(
                f"--optimizer {description.name} does not support {unsupported}: {reason}. Leave "
                f"{unsupported} out, or train with --optimizer adam."
            )
    for name, default in defaults.items():
        if getattr(args, name, default) != default:
            say(
                f"--{name.replace('_', '-')} {getattr(args, name)} has no effect with --optimizer "
                f"{description.name}"
            )
    if not clip_grad_given:
        args.clip_grad = description.clip_grad
    elif args.clip_grad != description.clip_grad:
        say(
            f"gradients are clipped at {args.clip_grad}, as --clip-grad asks; the default with "
            f"--optimizer {description.name} is {description.clip_grad:g}"
        )
    with as_adam(args):
        return original(args, *rest, **more)


def _refuse_flags_of(description: Description, args: argparse.Namespace) -> None:
    for h in description.hyperparameters:
        if getattr(args, destination(description, h), None) is not None:
            raise ValueError(
                f"{flag(description, h)} is a flag of --optimizer {description.name}, but this is "
                f"--optimizer {args.optimizer}. Leave it out, or choose --optimizer "
                f"{description.name}."
            )


def _check_device(args: argparse.Namespace) -> None:
    if cpu_device.active() and args.distributed_backend != "gloo":
        raise ValueError(
            f"--distributed-backend {args.distributed_backend} needs GPUs, and this job trains on "
            "the CPU. Leave the flag out, or train on GPUs (--s3-device cuda)."
        )


#: Names behind the mask of :func:`as_adam`, by the id of the object that wears it.
_masked: dict[int, str] = {}


@contextlib.contextmanager
def as_adam(holder: Any) -> Iterator[None]:
    """Inside, ``holder.optimizer`` reads "adam".

    Megatron sends every name it does not treat as adam or sgd to its layer-wise optimizers, and
    turns the distributed optimizer off for them; what fits Adam fits any element-wise optimizer.
    """
    name = _masked[id(holder)] = holder.optimizer
    holder.optimizer = "adam"
    try:
        yield
    finally:
        holder.optimizer = name
        del _masked[id(holder)]


def print_args(original: Callable[..., Any], title: str, args: argparse.Namespace) -> Any:
    """Around Megatron's printing of its arguments, which happens behind the mask."""
    shown = argparse.Namespace(**vars(args))
    shown.optimizer = _masked.get(id(args), args.optimizer)
    return original(title, shown)


def say(message: str) -> None:
    """Prints one line, on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"[megatron_s3] {message}", flush=True)
