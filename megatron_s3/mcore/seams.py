"""Every function of Megatron-LM's that the plugin wraps: the one list, its check, its installation.

With an ``--optimizer`` of Megatron's own each wrapper hands straight on, except where its row
says otherwise.
"""

import builtins
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_s3.mcore import (
    arguments,
    build,
    checkpoint,
    coverage,
    megatron_fsdp,
    param_groups,
    shard_files,
    telemetry,
    torch_adamw,
    writers,
)

__all__ = ["CHECKED_RELEASES", "SEAMS", "Seam", "SeamMoved", "install", "table"]

#: Releases of Megatron-LM on which every seam below was trained, saved and resumed through.
CHECKED_RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.0", "0.19.2", "main of 2026-08-22")

_MARK = "__megatron_s3_seam__"


class SeamMoved(RuntimeError):
    """A function the plugin wraps is missing or takes other parameters than it is known with."""


@dataclass(frozen=True)
class Seam:
    """A function of Megatron's and what is put around it.

    Attributes:
        module: where it is defined.
        name: its name there, ``Class.method`` for a method.
        parameters: the names its leading parameters must have.
        wrapper: called with the original, then the call's own arguments.
        purpose: what it does, and so what is missing without it.
        optional: a release may lack the module, and so has nothing to wrap.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]
    purpose: str
    optional: bool = False


SEAMS = (
    Seam(
        "megatron.training.arguments",
        "add_megatron_arguments",
        ("parser",),
        arguments.add_megatron_arguments,
        "adds the optimizers to --optimizer, their flags and --s3-device; on the CPU, gloo and "
        "layers without GPU kernels as defaults",
    ),
    Seam(
        "megatron.training.arguments",
        "validate_args",
        ("args", "defaults"),
        arguments.validate_args,
        "checks the flags, refuses what is not supported, sets --clip-grad's default, and keeps "
        "--use-distributed-optimizer, which Megatron turns off for all but adam and sgd",
    ),
    Seam(
        "megatron.training.arguments",
        "_print_args",
        ("title", "args"),
        arguments.print_args,
        "lets the printed arguments show the optimizer by its name",
    ),
    Seam(
        "megatron.training.training",
        "get_megatron_optimizer_config",
        ("args",),
        build.get_megatron_optimizer_config,
        "carries the flags into the optimizer's configuration",
    ),
    Seam(
        "megatron.core.optimizer",
        "get_megatron_optimizer",
        ("config", "model_chunks"),
        build.get_megatron_optimizer,
        "builds the optimizer over Megatron's main parameters, whole-model and sharded",
    ),
    Seam(
        "megatron.core.optimizer",
        "_get_megatron_optimizer_based_on_param_groups",
        ("config", "model_chunks", "param_groups"),
        coverage.build_part,
        "counts every optimizer that Megatron builds there, however deep, so that each trainable "
        "parameter is known to be stepped by one",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.state_dict",
        ("self",),
        torch_adamw.state_dict,
        "with --optimizer adam too: lets torch's AdamW load and save before its first step under "
        "the distributed optimizer, without Transformer Engine or Apex",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.load_state_dict",
        ("self", "state_dict"),
        torch_adamw.load_state_dict,
        "the same: keeps the resumed AdamW from counting a step once for each parameter; and gives "
        "each param group back its own values, also where Megatron takes several for one another",
    ),
    Seam(
        "megatron.core.optimizer.optimizer",
        "Float16OptimizerWithFloat16Params.load_state_dict",
        ("self", "state_dict"),
        param_groups.load_state_dict,
        "with --optimizer adam too: the same for param groups",
    ),
    Seam(
        "megatron.core.optimizer.optimizer",
        "FP32Optimizer.load_state_dict",
        ("self", "state_dict"),
        param_groups.load_state_dict,
        "the same for models in fp32",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._get_main_param_and_optimizer_states",
        ("self", "model_param"),
        torch_adamw.get_main_param_and_optimizer_states,
        "the same: a checkpoint of any format may be saved before the first update",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        ("self", "model_param", "tensors"),
        torch_adamw.set_main_param_and_optimizer_states,
        "the same, for the checkpoint formats that do not hold AdamW's step beside its averages; "
        "and compares what is loaded as main parameters with the weights",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        ("self", "model_sharded_state_dict", "is_loading"),
        shard_files.sharded_param_state_fully_reshardable,
        "with --optimizer adam too: saves what the ranks hold where buckets are padded, of which "
        "Megatron up to 0.19.2 saves other elements (--dist-ckpt-optim-fully-reshardable)",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.get_parameter_state_dp_reshardable",
        ("self",),
        shard_files.get_parameter_state_dp_reshardable,
        "with --optimizer adam too: lets a rank save whose share of a bucket is padding alone; "
        "zeros between parameters, where Megatron saves memory as it finds it",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.sharded_param_state_dp_reshardable",
        ("self", "model_sharded_state_dict", "is_loading"),
        shard_files.sharded_param_state_dp_reshardable,
        "the same: lets that rank load",
    ),
    Seam(
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler.load_state_dict",
        ("self", "state_dict"),
        param_groups.load_schedule,
        "with --optimizer adam too: the first step after --use-checkpoint-opt_param-scheduler has "
        "the checkpoint's weight decay",
    ),
    Seam(
        "megatron.core.dist_checkpointing.optimizer",
        "get_optim_param_to_id_map",
        ("optim_params_iter",),
        checkpoint.optim_param_to_id_map,
        "with --optimizer adam too: finds a parameter of torch FSDP2's by its own local tensor, "
        "where torch from 2.13 on gives a new one each time",
    ),
    Seam(
        "megatron.training.global_vars",
        "_set_tensorboard_writer",
        ("args",),
        telemetry.set_tensorboard_writer,
        "with --optimizer adam too: goes on without TensorBoard's log where the disk does not take "
        "it, and says so",
    ),
    Seam(
        "megatron.training.training",
        "training_log",
        (
            *("loss_dict", "total_loss_dict", "learning_rate", "iteration", "loss_scale"),
            *("report_memory_flag", "skipped_iter", "grad_norm"),
        ),
        telemetry.training_log,
        "with --optimizer adam too: says that a loss is not finite, which Megatron's log leaves "
        "out; with --s3-log-updates or --s3-metrics writes the log of each interval",
    ),
    Seam(
        "megatron.training.training",
        "evaluate_and_print_results",
        ("prefix", "forward_step_func", "data_iterator", "model", "iteration"),
        telemetry.evaluate_and_print_results,
        "with --s3-log-updates or --s3-metrics alone: the same for the log of evaluations",
    ),
    Seam(
        "megatron.training.training",
        "evaluate",
        ("forward_step_func",),
        telemetry.evaluate,
        "the same: the loss of an evaluation",
    ),
    Seam(
        "megatron.training.checkpointing",
        "_load_base_checkpoint",
        ("load_dir", "args"),
        checkpoint.load_base_checkpoint,
        "with --optimizer adam too: refuses a damaged checkpoint, and another optimizer's state, "
        "before any of it is loaded",
    ),
    Seam(
        "megatron.training.checkpointing",
        "load_checkpoint",
        ("ddp_model", "optimizer", "opt_param_scheduler"),
        checkpoint.load_checkpoint,
        "with --optimizer adam too: chooses the iteration once, for all that is read of it; a "
        "checkpoint that cannot be read ends the run with status 1, where Megatron ends it with 0",
    ),
    Seam(
        "megatron.training.checkpointing",
        "read_metadata",
        ("tracker_filename",),
        checkpoint.read_metadata,
        "with --optimizer adam too: the optimizer's state is of the iteration that was chosen and "
        "checked, where Megatron in the format torch reads the tracker file again",
    ),
    Seam(
        "megatron.training.checkpointing",
        "preprocess_fsdp_dtensor_state_dict",
        ("args", "raw_state_dict", "model"),
        megatron_fsdp.preprocess_fsdp_dtensor_state_dict,
        "splits the states of fused weights under Megatron-FSDP by their names, for which Megatron "
        "has Adam's",
    ),
    Seam(
        "megatron.training.checkpointing",
        "save_checkpoint",
        ("iteration", "model", "optimizer", "opt_param_scheduler"),
        checkpoint.save_checkpoint,
        "with --optimizer adam too: says where and why a checkpoint could not be saved, and does "
        "for torch_dcp and fsdp_dtensor what save does; with --s3-metrics the spikes so far "
        "are in it",
    ),
    Seam(
        "megatron.training.async_utils",
        "maybe_finalize_async_save",
        ("blocking",),
        checkpoint.maybe_finalize_async_save,
        "with --optimizer adam too: says so of asynchronous saves",
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "FileSystemWriterAsync.write_preloaded_data",
        ("transform_list", "local_proc_idx", "write_bucket"),
        writers.write_preloaded_data,
        "with --optimizer adam too: a failed write does not kill the process that writes "
        "asynchronous checkpoints",
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.schedule_async_call",
        ("self", "async_req"),
        writers.schedule_async_call,
        "with --optimizer adam too: a save that would wait forever for a dead writer is an error",
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.is_current_async_call_done",
        ("self", "blocking", "no_dist"),
        writers.is_current_async_call_done,
        "with --optimizer adam too: a writer that died during a save is an error",
    ),
    Seam(
        "megatron.core.optimizer.optimizer_cuda_graph",
        "OptimizerCudaGraphWrapper.__call__",
        ("self",),
        build.replay,
        "counts the steps that a CUDA graph of the optimizer replays",
        optional=True,
    ),
    Seam(
        "megatron.core.dist_checkpointing.serialization",
        "save",
        ("sharded_state_dict", "checkpoint_dir"),
        checkpoint.save,
        "with --optimizer adam too: an iteration that is overwritten is no complete one meanwhile",
    ),
    Seam(
        "megatron.core.dist_checkpointing.serialization",
        "save_config",
        ("config", "checkpoint_dir"),
        checkpoint.save_config,
        "with --optimizer adam too: writes checksums of the files that have none of their own",
    ),
    Seam(
        "megatron.core.msc_utils",
        "open",
        ("file", "mode"),
        checkpoint.open_file,
        "with --optimizer adam too: replaces latest_checkpointed_iteration.txt whole, so that no "
        "kill and no full disk leaves it empty, and for torch_dcp and fsdp_dtensor does what "
        "save_config does",
    ),
)


def install() -> None:
    """Checks every seam, then wraps each, wherever Megatron has bound it.  Idempotent.

    Seams in ``megatron.training`` are left out where only megatron-core is installed.

    Raises:
        SeamMoved: a seam is not as expected; nothing is wrapped then.
    """
    has_training = importlib.util.find_spec("megatron.training") is not None
    seams = [s for s in SEAMS if has_training or not s.module.startswith("megatron.training")]
    seams = [s for s in seams if not s.optional or importlib.util.find_spec(s.module)]
    found = [(seam, *_resolve(seam)) for seam in seams]
    for seam, owner, original in found:
        if not hasattr(original, _MARK):
            _wrap(seam, owner, original)


def table() -> str:
    """The README's table of seams, in Markdown."""
    rows = [f"| `{seam.name}` | {seam.module} | {seam.purpose} |" for seam in SEAMS]
    return "\n".join(["| wrapped | in | it |", "|---|---|---|", *rows])


def _resolve(seam: Seam) -> tuple[Any, Callable[..., Any]]:
    """The object that holds the seam's function, and the function; checked.

    A builtin is wrapped as a name of the module that uses it.
    """
    module = importlib.import_module(seam.module)
    *path, name = seam.name.split(".")
    try:
        owner = functools.reduce(getattr, path, module)
        function = getattr(owner, name, None) or getattr(builtins, name)
    except AttributeError:
        raise _moved(seam, "is not there") from None
    parameters = tuple(inspect.signature(function).parameters)
    if parameters[: len(seam.parameters)] != seam.parameters:
        raise _moved(seam, f"takes ({', '.join(parameters)})")
    return owner, function


def _moved(seam: Seam, fault: str) -> SeamMoved:
    try:
        release = "megatron-core " + importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        release = "this Megatron-LM tree"
    return SeamMoved(
        f"{seam.module}.{seam.name} {fault} in {release}, where megatron_s3 expects it to take "
        f"({', '.join(seam.parameters)}, ...). It {seam.purpose}. Nothing was wrapped. Use one of "
        f"the releases the plugin was checked on ({', '.join(CHECKED_RELEASES)}), or a newer "
        "megatron_s3."
    )


def _wrap(seam: Seam, owner: Any, original: Callable[..., Any]) -> None:
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return seam.wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, seam)
    static = isinstance(inspect.getattr_static(owner, original.__name__, None), staticmethod)
    setattr(owner, original.__name__, staticmethod(wrapped) if static else wrapped)
    if not isinstance(owner, ModuleType):
        return
    # Modules that did `from ... import function` hold it under their own name: which ones do
    # differs between releases.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "megatron" and module is not None:
            for attribute, value in list(vars(module).items()):
                if value is original:
                    setattr(module, attribute, wrapped)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(f"error: {sys.argv[1]}: this prints a table, and takes no argument", file=sys.stderr)
        sys.exit(2)
    print(table())
