"""Flags: those of the plugin's optimizers, their validation, and what is refused with them."""

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch

from megatron_s3.mcore import cpu_device
from megatron_s3.mcore.refusal import Refused
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer
from megatron_s3.optimizers.description import FORMAT, Description, Hyperparameter

__all__ = [
    "DEVICES",
    "add_megatron_arguments",
    "as_adam",
    "changes_by_step",
    "check_config",
    "destination",
    "flag",
    "hyperparameters",
    "needs_grad_norm",
    "print_args",
    "say",
    "state_dtypes",
    "switches",
    "validate_args",
]

#: Values of ``--s3-device``.
DEVICES = ("auto", "cuda", "cpu")

#: Arguments that the plugin's optimizers do not support yet: destination, flag, reason.
UNSUPPORTED = (("yaml_cfg", "--yaml-cfg", "its flags are checked on the command line only"),)

#: Other defaults of Megatron's flags where it trains on the CPU: its own name GPU kernels.
CPU_DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "gradient_reduce_div_fusion": False,  # gloo sums, and does no more
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}

#: Switches for all of the plugin's optimizers: destination, help.
SWITCHES = (
    (
        "s3_log_grad_norm",
        "compute and log the gradient norm although nothing needs it: a pass over the gradients, "
        "an all-reduce and a host synchronisation each step; else the step returns 0.0 for it",
    ),
    (
        "s3_log_updates",
        "log size, share of large ones and ratio to the weights of each logging interval's "
        "updates, by kind of parameter and layer, to TensorBoard, Weights & Biases and "
        "metrics.jsonl",
    ),
    (
        "s3_metrics",
        "write losses, learning rate and the like to metrics.jsonl in --tensorboard-dir (else "
        "--save), with any --optimizer; implied by --s3-log-updates",
    ),
    (
        "s3_no_verify_checkpoint",
        "do not compare a checkpoint's data with its checksums before it is loaded (with any "
        "--optimizer)",
    ),
    (
        "s3_no_fused",
        "step with torch operations, between Megatron's copies of gradients and of parameters, "
        "instead of a fused kernel that needs neither; slower, with the same result",
    ),
)

#: Those that have an effect with Megatron's own optimizers too.
_FOR_ALL = ("s3_metrics", "s3_no_verify_checkpoint")

#: Flags of ``--use-precision-aware-optimizer``: destination, in the order of an optimizer's states.
_STATE_DTYPES = ("exp_avg_dtype", "exp_avg_sq_dtype")

#: What Megatron's flags call the dtypes; its validation replaces the names.
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.uint8,
}

#: Flags of Megatron's own optimizers that have no effect under another one.
_OF_OTHER_OPTIMIZERS = (
    *("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum"),
    "use_torch_optimizer_for_cpu_offload",
)


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
    # Of two of one name (Megatron's lion is a hybrid with Adam) the plugin's is taken, and said.
    known["--optimizer"].choices = list(dict.fromkeys((*known["--optimizer"].choices, *OPTIMIZERS)))
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
    for name, meaning in SWITCHES:
        group.add_argument(_flag(name), action="store_true", help=meaning)
    upstream = list(_OF_OTHER_OPTIMIZERS)
    for cls in OPTIMIZERS.values():
        description = cls.description
        group = parser.add_argument_group(description.label)
        for h in description.hyperparameters:
            if flag(description, h) in known:  # Megatron has the same, with the same meaning
                upstream.append(destination(description, h))
                continue
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
    parser.set_defaults(_s3_upstream_defaults={name: parser.get_default(name) for name in upstream})
    return parser


def validate_args(
    original: Callable[..., Any], args: argparse.Namespace, *rest: Any, **more: Any
) -> Any:
    """Around Megatron's validation: ours first, then Megatron's as it treats adam.

    Raises:
        Refused: naming the flag, the reason and what to do.
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
    clip_grad_given = not isinstance(args.clip_grad, _Default)
    args.s3_format = FORMAT  # saved with the arguments
    _check_device(args)
    if getattr(args, "rampup_batch_size", None) and hasattr(args, "step_batch_size_schedule"):
        raise ValueError(
            f"--rampup-batch-size {' '.join(map(str, args.rampup_batch_size))} has no effect in "
            "this release of Megatron: every batch would be of the full size. Give "
            "--step-batch-size-schedule instead, or leave it out."
        )
    for other in OPTIMIZERS.values():
        if other.description.name != args.optimizer:
            _refuse_flags_of(other.description, args, defaults)
    cls = OPTIMIZERS.get(args.optimizer)
    if cls is None:
        for name, _ in SWITCHES:
            if getattr(args, name) and name not in _FOR_ALL:
                known = ", ".join(OPTIMIZERS)
                raise ValueError(
                    f"{_flag(name)} does nothing with --optimizer {args.optimizer}: "
                    f"it is for the plugin's optimizers ({known}). Leave it out."
                )
        _check_metrics(args)
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
    _check_metrics(args)
    if getattr(args, "use_megatron_fsdp", False) and (
        getattr(args, "megatron_fsdp_version", 1) == 2  # from main of 2026 on
    ):
        raise ValueError(
            f"--optimizer {description.name} does not support --megatron-fsdp-version 2: it steps "
            "by Megatron's DistributedOptimizer, which version 2 does without. Leave it out (1), "
            "or give --use-torch-fsdp2 instead of --use-megatron-fsdp."
        )
    _check_memory(args, cls)
    own = {destination(description, h) for h in description.hyperparameters}
    for name, default in defaults.items():
        if name not in own and getattr(args, name, default) != default:
            say(
                f"{_flag(name)} {getattr(args, name)} has no effect with --optimizer "
                f"{description.name}"
            )
    for name in _STATE_DTYPES[len(description.state) :]:
        dtype = _dtype(getattr(args, name, torch.float32))
        if args.use_precision_aware_optimizer and dtype != torch.float32:
            say(f"{_flag(name)} {_named(dtype)} has no effect with --optimizer {description.name}")
    if not clip_grad_given:
        args.clip_grad = description.clip_grad
    elif args.clip_grad != description.clip_grad:
        say(
            f"gradients are clipped at {args.clip_grad}, as --clip-grad asks; the default with "
            f"--optimizer {description.name} is {description.clip_grad:g}"
        )
    with as_adam(args):
        result = original(args, *rest, **more)
    if getattr(args, "use_megatron_fsdp", False):
        _check_megatron_fsdp(args)
    return result


def hyperparameters(cls: type[ElementwiseOptimizer], holder: Any) -> dict[str, Any]:
    """The optimizer's, as ``holder`` has them under their flags' destinations, or by default."""
    values = {}
    for h in cls.description.hyperparameters:
        value = getattr(holder, destination(cls.description, h), None)
        values[h.name] = h.default if value is None else value
    return values


def switches(holder: Any) -> dict[str, bool]:
    """The values of :data:`SWITCHES` in Megatron's arguments or optimizer configuration."""
    return {name: bool(getattr(holder, name, False)) for name, _ in SWITCHES}


def state_dtypes(cls: type[ElementwiseOptimizer], holder: Any) -> dict[str, torch.dtype]:
    """The dtypes that arguments or an optimizer configuration ask for, by the states' names.

    ``--exp-avg-dtype`` is the first state's and ``--exp-avg-sq-dtype`` the second's, whatever the
    optimizer calls them; without ``--use-precision-aware-optimizer`` all are float32.
    """
    if not getattr(holder, "use_precision_aware_optimizer", False):
        return dict.fromkeys(cls.description.state, torch.float32)
    pairs = zip(cls.description.state, _STATE_DTYPES, strict=False)
    return {name: _dtype(getattr(holder, asked)) for name, asked in pairs}


def needs_grad_norm(holder: Any) -> bool:
    """Whether something reads the gradients' norm each step: clipping, a threshold, the log."""
    return (
        holder.clip_grad > 0
        or math.isfinite(getattr(holder, "grad_norm_skip_threshold", math.inf))
        or bool(getattr(holder, "s3_log_grad_norm", False))
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _dtype(value: str | torch.dtype) -> torch.dtype:
    return _DTYPES.get(value, value)


def check_config(config: Any, ddp_config: Any, cls: type[ElementwiseOptimizer]) -> None:
    """For callers without a command line, what :func:`validate_args` refuses of these.

    Args:
        config: Megatron's OptimizerConfig.
        ddp_config: the model's DistributedDataParallelConfig, or None.
        cls: the optimizer.

    Raises:
        ValueError: naming a field as the flag of the same name.
    """
    of_ddp = {} if ddp_config is None else vars(ddp_config)
    holder = argparse.Namespace(**of_ddp | vars(config))
    holder.accumulate_allreduce_grads_in_fp32 = of_ddp.get("grad_reduce_in_fp32", True)
    _check_memory(holder, cls, anywhere=True)


def _check_memory(args: Any, cls: type[ElementwiseOptimizer], anywhere: bool = False) -> None:
    """Raises ValueError for what cannot be kept, or stepped, where and how it is asked for."""
    _check_precision(args, cls)
    _check_offload(args, cls)
    _check_cuda_graph(args, cls, anywhere)


def _named(dtype: torch.dtype) -> str:
    return next((name for name, value in _DTYPES.items() if value == dtype), str(dtype))


def _check_precision(args: Any, cls: type[ElementwiseOptimizer]) -> None:
    """Raises ValueError for dtypes that the optimizer, or what is around it, cannot keep."""
    asked = {
        name: _dtype(getattr(args, name, torch.float32))
        for name in ("main_grads_dtype", "main_params_dtype", *_STATE_DTYPES)
    }
    label = f"--optimizer {cls.description.name}"
    if not getattr(args, "use_precision_aware_optimizer", False):
        for name, dtype in asked.items():
            if dtype != torch.float32:
                raise ValueError(
                    f"{_flag(name)} {_named(dtype)} is a flag of --use-precision-aware-optimizer, "
                    "which is not given: everything would be fp32. Add it, or leave "
                    f"{_flag(name)} out."
                )
        return
    if getattr(args, "use_megatron_fsdp", False):
        if asked["main_grads_dtype"] != torch.float32:
            raise ValueError(
                f"--main-grads-dtype {_named(asked['main_grads_dtype'])} has no effect with "
                "--use-megatron-fsdp. Give --megatron-fsdp-main-grads-dtype instead."
            )
    elif not args.use_distributed_optimizer:
        raise ValueError(
            "--use-precision-aware-optimizer needs --use-distributed-optimizer: Megatron has it "
            "nowhere else. Add that, or leave --use-precision-aware-optimizer out."
        )
    for name in ("fp8_param_gather", "fp4_param_gather"):
        if getattr(args, name, False):
            raise ValueError(
                f"{_flag(name)} with --use-precision-aware-optimizer is not supported by {label}: "
                "it does not write quantized parameters. Leave one of the two out."
            )
    if asked["main_params_dtype"] != torch.float32:
        raise ValueError(
            f"--main-params-dtype {_named(asked['main_params_dtype'])} is not supported by "
            f"{label}: an update is smaller than what fp16 resolves of a parameter. Leave it out "
            "(fp32)."
        )
    if args.fp16 and not args.accumulate_allreduce_grads_in_fp32:
        raise ValueError(
            "--use-precision-aware-optimizer with --fp16 needs "
            "--accumulate-allreduce-grads-in-fp32: gradients would be unscaled in fp16, where all "
            "below 6e-8 vanish. Add that, or use --bf16."
        )
    values = hyperparameters(cls, args)
    for state, name in zip(cls.description.state, _STATE_DTYPES, strict=False):
        try:
            cls.check_state_dtype(state, asked[name], values)
        except ValueError as error:
            raise ValueError(f"{_flag(name)} {_named(asked[name])}: {error}") from None


def _check_offload(args: Any, cls: type[ElementwiseOptimizer]) -> None:
    """Raises ValueError for what an optimizer that is partly in the CPU's memory cannot do."""
    if not getattr(args, "optimizer_cpu_offload", False):
        return
    label = f"--optimizer {cls.description.name} with --optimizer-cpu-offload"
    if not args.use_precision_aware_optimizer:
        raise ValueError(
            f"{label} needs --use-precision-aware-optimizer (and --use-distributed-optimizer), as "
            "Megatron has it with Adam. Add that, or leave --optimizer-cpu-offload out."
        )
    if not 0 < args.optimizer_offload_fraction <= 1:
        raise ValueError(
            f"--optimizer-offload-fraction {args.optimizer_offload_fraction} must be in (0, 1]: "
            "which part of the optimizer's states the CPU keeps and updates. Change it, or leave "
            "--optimizer-cpu-offload out."
        )
    for name, reason in (
        ("optimizer_cuda_graph", "a graph does not replay the CPU's part"),
        ("async_save", "the writer would read memory of the CPU's that training goes on changing"),
        ("use_megatron_fsdp", "its main parameters are Megatron-FSDP's, on the GPU"),
    ):
        if getattr(args, name, False):
            raise ValueError(
                f"{label} does not support {_flag(name)}: {reason}. Leave one of the two out."
            )


def _check_megatron_fsdp(args: argparse.Namespace) -> None:
    """Raises ValueError for what this release's Megatron-FSDP cannot do; of validated arguments."""
    from megatron.core.distributed import DistributedDataParallelConfig

    if not args.use_distributed_optimizer:  # from 0.18 on Megatron adds it
        raise ValueError(
            "--use-megatron-fsdp needs --use-distributed-optimizer: without it this release of "
            "Megatron steps with gradients that are not the model's. Add it."
        )
    if getattr(args, "use_precision_aware_optimizer", False) and not hasattr(
        DistributedDataParallelConfig, "megatron_fsdp_use_decoupled_grad"
    ):
        raise ValueError(
            "--use-precision-aware-optimizer with --use-megatron-fsdp needs Megatron-Core 0.18: "
            "before, gradients are not where Megatron measures and clips them. Leave one of the "
            "two out."
        )
    dtype = getattr(args, "megatron_fsdp_main_params_dtype", torch.float32)
    dtype = dtype or args.params_dtype  # None is auto
    if dtype != torch.float32:
        say(
            f"main parameters are kept in {dtype}, as --megatron-fsdp-main-params-dtype asks: what "
            "an update changes by less than their rounding is lost"
        )


def _check_cuda_graph(args: Any, cls: type[ElementwiseOptimizer], anywhere: bool = False) -> None:
    """Raises ValueError for what a step that is replayed from a CUDA graph cannot do."""
    if not getattr(args, "optimizer_cuda_graph", False):
        return
    why_not = None
    if cpu_device.active() and not anywhere:
        why_not = "there are no CUDA graphs where it trains on the CPU"
    elif switches(args)["s3_no_fused"]:
        why_not = "with --s3-no-fused there is no kernel to record"
    elif switches(args)["s3_log_updates"]:
        why_not = "nothing would count for --s3-log-updates: a replay runs no Python"
    elif args.fp16 or getattr(args, "loss_scale", None):
        why_not = "under a loss scale the host reads whether gradients overflowed"
    elif getattr(args, "rl_offload_optimizer_during_inference", False):
        why_not = "--rl-offload-optimizer-during-inference moves what a graph goes on writing to"
    elif getattr(args, "use_megatron_fsdp", False):
        why_not = "Megatron-FSDP's gradients lie elsewhere from step to step"
    elif getattr(args, "weight_decay_incr_style", "constant") != "constant":
        why_not = (
            f"--weight-decay-incr-style {args.weight_decay_incr_style} changes a number that is "
            "recorded"
        )
    elif changes_by_step(cls, hyperparameters(cls, args)):
        why_not = "bias correction or a ramp changes a number each step that is recorded"
    if why_not:
        raise ValueError(
            f"--optimizer {cls.description.name} does not support --optimizer-cuda-graph here: "
            f"{why_not}. Leave one of the two out."
        )


def _check_metrics(args: argparse.Namespace) -> None:
    args.s3_metrics = args.s3_metrics or args.s3_log_updates
    if args.s3_metrics and not (args.tensorboard_dir or args.save):
        asked = "--s3-log-updates" if args.s3_log_updates else "--s3-metrics"
        raise ValueError(
            f"{asked} has no folder to write metrics.jsonl to. Give --tensorboard-dir or --save, "
            f"or leave {asked} out."
        )


def changes_by_step(cls: type[ElementwiseOptimizer], values: dict[str, Any]) -> bool:
    """Returns whether the rule's arguments differ from step to step."""
    optimizer = cls([torch.zeros(1)], lr=0.0, **values)
    (group,) = optimizer.param_groups
    one, other = (optimizer.group_hyperparameters(group | {"step": t}) for t in (1, 100))
    return one != other


def _refuse_flags_of(
    description: Description, args: argparse.Namespace, upstream: Container[str]
) -> None:
    for h in description.hyperparameters:
        name = destination(description, h)
        if name not in upstream and getattr(args, name, None) is not None:
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
