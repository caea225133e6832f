"""Checks of flags: combinations that an optimizer does not support are rejected with an error."""

import argparse
from collections.abc import Container, Sequence
from typing import Any

import torch

from megatron_s3.log import say
from megatron_s3.mcore import compat_before_0_18, cpu_device
from megatron_s3.mcore.arguments.names import (
    STATE_DTYPES,
    destination,
    dtype_name,
    dtype_of,
    flag,
    flag_named,
)
from megatron_s3.mcore.arguments.readers import (
    changes_by_step,
    hyperparameters,
    state_dtypes,
    switches,
)
from megatron_s3.optimizers import ElementwiseOptimizer
from megatron_s3.optimizers.description import Description

__all__ = [
    "check_clip_grad",
    "check_config",
    "check_cuda_graph",
    "check_device",
    "check_megatron_fsdp",
    "check_memory",
    "check_metrics",
    "check_scalar",
    "check_several",
    "refuse_flags_of",
]


def check_config(config: Any, ddp_config: Any, cls: type[ElementwiseOptimizer]) -> None:
    """Makes the checks of :func:`validate_args` for callers without a command line.

    Args:
        config: Megatron's OptimizerConfig.
        ddp_config: the model's DistributedDataParallelConfig, or None.
        cls: the optimizer.

    Raises:
        ValueError: a check fails.  The message names a field as the flag of the same name.
    """
    of_ddp = {} if ddp_config is None else vars(ddp_config)
    holder = argparse.Namespace(**of_ddp | vars(config))
    holder.accumulate_allreduce_grads_in_fp32 = of_ddp.get("grad_reduce_in_fp32", True)
    check_memory(holder, cls, anywhere=True)


def check_clip_grad(value: float, name: str) -> None:
    """Raises ValueError for a limit that Megatron, which compares it with 0, would ignore."""
    if not value >= 0:
        raise ValueError(
            f"{name} must be at least 0, not {value}: gradients would not be clipped. 0 turns "
            "clipping off."
        )


def check_several(
    config: Any, ddp_config: Any, classes: Sequence[type[ElementwiseOptimizer]]
) -> None:
    """Raises ValueError if a setting is not supported with several optimizers in one model.

    Args:
        config: Megatron's OptimizerConfig or arguments.
        ddp_config: the model's DistributedDataParallelConfig, Megatron's arguments, or None.
        classes: the optimizers of the model.
    """
    if len(classes) == 1:
        return
    both = " and ".join(cls.description.name for cls in classes)
    if getattr(ddp_config, "use_megatron_fsdp", False):
        raise ValueError(
            f"the optimizers {both} in one model do not support --use-megatron-fsdp, whose "
            "checkpoints have one set of states for all parameters. Leave it out, or use one "
            "optimizer."
        )


def check_scalar(config: Any, cls: type[ElementwiseOptimizer], ddp_config: Any = None) -> bool:
    """Checks the settings that ``--muon-scalar-optimizer`` may be given with.

    Args:
        config: Megatron's OptimizerConfig or arguments.
        cls: the optimizer of the plugin that the flag names.
        ddp_config: the model's DistributedDataParallelConfig; None with arguments.

    Returns:
        Whether the states of Muon and of the optimizer are sharded.

    Raises:
        ValueError: a setting is not supported.
    """
    label = f"--muon-scalar-optimizer {cls.description.name}"
    for name, reason in (
        ("use_precision_aware_optimizer", "Muon has no such states"),
        ("optimizer_cpu_offload", "Muon's states stay on the device"),
        ("optimizer_cuda_graph", "Muon's step is not captured"),
    ):
        if getattr(config, name, False):
            raise ValueError(
                f"{label} does not support {flag_named(name)}: {reason}. Leave one of the two out."
            )
    by = ("use_layer_wise_distributed_optimizer", "use_distributed_optimizer")
    sharded = str(config.optimizer).startswith("dist_") or any(getattr(config, n, 0) for n in by)
    if sharded:
        _check_sharded_scalar(label, config, ddp_config)
    return sharded


def _check_sharded_scalar(label: str, config: Any, ddp_config: Any) -> None:
    """Raises ValueError if Megatron does not shard Muon and another optimizer with a setting."""
    is_trainers = hasattr(config, "ckpt_format")
    instances = getattr(ddp_config or config, "num_distributed_optimizer_instances", 1)
    for fault, why in (
        (
            is_trainers and not hasattr(config, "use_layer_wise_param_layout"),
            "this release of Megatron: it does not shard the two separately. Use megatron-core "
            "0.18 or newer, or --optimizer muon without --use-distributed-optimizer",
        ),
        (
            not getattr(config, "use_layer_wise_param_layout", True),
            "--no-use-layer-wise-param-layout: Megatron shards the two separately with that "
            "layout alone. Leave it out",
        ),
        (
            is_trainers and config.ckpt_format == "torch",
            "--ckpt-format torch: Megatron cannot save the two in it. Leave it out (torch_dist)",
        ),
        (
            not (config.bf16 or config.fp16),  # Megatron itself refuses fp16
            "models in fp32: Megatron cannot chain the two. Add --bf16",
        ),
        (
            instances > 1,
            f"--num-distributed-optimizer-instances {instances}: Megatron shards Muon over all "
            "data-parallel ranks. Leave it out",
        ),
    ):
        if fault:
            raise ValueError(f"{label} with sharded states does not support {why}.")


def check_memory(args: Any, cls: type[ElementwiseOptimizer], anywhere: bool = False) -> None:
    """Raises ValueError if the states' dtypes, CPU offload or a CUDA graph are not supported."""
    _check_precision(args, cls)
    _check_offload(args, cls)
    check_cuda_graph(args, cls, anywhere)


def _check_precision(args: Any, cls: type[ElementwiseOptimizer]) -> None:
    """Raises ValueError for dtypes that the optimizer or Megatron does not support."""
    asked = {
        name: dtype_of(getattr(args, name, torch.float32))
        for name in ("main_grads_dtype", "main_params_dtype", *STATE_DTYPES)
    }
    label = f"--optimizer {cls.description.name}"
    aware = getattr(args, "use_precision_aware_optimizer", False)
    others = ("use_megatron_fsdp", "optimizer_cpu_offload")
    stored = aware and args.bf16 and not any(getattr(args, name, False) for name in others)
    if switches(args)["plugin_no_param_remainders"] and not stored:
        raise ValueError(
            "--plugin-no-param-remainders has no effect here: main parameters are in fp32 anyway. "
            "It is for --use-precision-aware-optimizer with --bf16, without "
            "--optimizer-cpu-offload and --use-megatron-fsdp. Leave it out."
        )
    if not aware:
        for name, dtype in asked.items():
            if dtype != torch.float32:
                raise ValueError(
                    f"{flag_named(name)} {dtype_name(dtype)} is a flag of "
                    "--use-precision-aware-optimizer, which is not given: everything would be "
                    "fp32. Add it, or leave "
                    f"{flag_named(name)} out."
                )
        return
    if getattr(args, "use_megatron_fsdp", False):
        if asked["main_grads_dtype"] != torch.float32:
            raise ValueError(
                f"--main-grads-dtype {dtype_name(asked['main_grads_dtype'])} has no effect with "
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
                f"{flag_named(name)} with --use-precision-aware-optimizer is not supported by "
                f"{label}: it does not write quantized parameters. Leave one of the two out."
            )
    if asked["main_params_dtype"] != torch.float32:
        raise ValueError(
            f"--main-params-dtype {dtype_name(asked['main_params_dtype'])} is not supported by "
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
    dtypes = state_dtypes(cls, args)
    for state, name in zip(cls.description.state, STATE_DTYPES, strict=False):
        try:
            cls.check_state_dtype(state, dtypes[state], values)
        except ValueError as error:
            raise ValueError(f"{flag_named(name)} {dtype_name(asked[name])}: {error}") from None


def _check_offload(args: Any, cls: type[ElementwiseOptimizer]) -> None:
    """Raises ValueError if a setting is not supported with ``--optimizer-cpu-offload``."""
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
                f"{label} does not support {flag_named(name)}: {reason}. Leave one of the two out."
            )


def check_cuda_graph(args: Any, cls: type[ElementwiseOptimizer], anywhere: bool = False) -> None:
    """Raises ValueError if a setting is not supported with ``--optimizer-cuda-graph``."""
    if not getattr(args, "optimizer_cuda_graph", False):
        return
    why_not = None
    if cpu_device.active() and not anywhere:
        why_not = "there are no CUDA graphs where it trains on the CPU"
    elif switches(args)["plugin_no_fused"]:
        why_not = "with --plugin-no-fused there is no kernel to record"
    elif switches(args)["plugin_log_updates"]:
        why_not = "nothing would count for --plugin-log-updates: a replay runs no Python"
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
    elif torch.int8 in state_dtypes(cls, args).values():
        why_not = "the rounding of --exp-avg-dtype fp8 changes each step"
    elif changes_by_step(cls, hyperparameters(cls, args)):
        why_not = (
            "bias correction, a ramp or cautious_steps changes by the step what is recorded once"
        )
    if why_not:
        raise ValueError(
            f"--optimizer {cls.description.name} does not support --optimizer-cuda-graph here: "
            f"{why_not}. Leave one of the two out."
        )


def check_megatron_fsdp(args: argparse.Namespace) -> None:
    """Raises ValueError if Megatron-FSDP lacks something; logs if updates lose precision.

    Args:
        args: Megatron's validated arguments.
    """
    compat_before_0_18.check_megatron_fsdp(args)
    dtype = getattr(args, "megatron_fsdp_main_params_dtype", torch.float32)
    dtype = dtype or args.params_dtype  # None means "auto"
    if dtype != torch.float32:
        say(
            f"main parameters are kept in {dtype} (--megatron-fsdp-main-params-dtype): updates "
            "smaller than its rounding are lost"
        )


def check_metrics(args: argparse.Namespace) -> None:
    """Raises ValueError if a log is requested without a folder to write it to."""
    args.plugin_metrics = args.plugin_metrics or args.plugin_log_updates
    if args.plugin_metrics and not (args.tensorboard_dir or args.save):
        asked = "--plugin-log-updates" if args.plugin_log_updates else "--plugin-metrics"
        raise ValueError(
            f"{asked} has no folder to write metrics.jsonl to. Give --tensorboard-dir or --save, "
            f"or leave {asked} out."
        )


def check_device(args: argparse.Namespace) -> None:
    """Raises ValueError if the backend needs GPUs and the job trains on the CPU."""
    if cpu_device.active() and args.distributed_backend != "gloo":
        raise ValueError(
            f"--distributed-backend {args.distributed_backend} needs GPUs, and this job trains on "
            "the CPU. Leave the flag out, or train on GPUs (--plugin-device cuda)."
        )


def refuse_flags_of(
    description: Description, args: argparse.Namespace, upstream: Container[str]
) -> None:
    """Raises ValueError if a flag of another optimizer is given.

    Args:
        description: the description of the other optimizer.
        args: Megatron's arguments.
        upstream: destinations of Megatron's own flags, which are not checked.
    """
    for h in description.hyperparameters:
        name = destination(description, h)
        if name not in upstream and getattr(args, name, None) is not None:
            raise ValueError(
                f"{flag(description, h)} is a flag of --optimizer {description.name}, but this is "
                f"--optimizer {args.optimizer}. Leave it out, or choose --optimizer "
                f"{description.name}."
            )
