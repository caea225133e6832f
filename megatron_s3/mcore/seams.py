"""Everything of Megatron-LM's that the plugin wraps or replaces: the one list of seams.

With an ``--optimizer`` of Megatron's own each wrapper hands straight on, except where its row
says otherwise.
"""

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from megatron_s3.log import say
from megatron_s3.mcore import (
    arguments,
    build,
    chained,
    compat_before_0_19,
    configuration,
    coverage,
    datasets,
    megatron_fsdp,
    telemetry,
    torch_adamw,
    torch_fsdp2,
)
from megatron_s3.mcore.checkpoint import (
    async_writers,
    library,
    loading,
    param_groups,
    saving,
    shards,
)
from megatron_s3.mcore.rebinding import rebind, unreached
from megatron_s3.mcore.seam import Builtin, Extended, Replaced, Seam, SeamMoved, Wrapped

__all__ = ["SEAMS", "Seam", "SeamMoved", "install"]


def _with(*methods: str) -> dict[str, Any]:
    """Returns what a class is known by whose objects become those of a class of the plugin's."""
    fits = lambda cls: all(callable(getattr(cls, name, None)) for name in methods)
    return {"shape": f"a class with {', '.join(methods)}", "fits": fits}


def _reads(module: str, name: str) -> bool:
    """Returns whether a function of the module's reads a global of that name."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    loads = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    return any(node.id == name for node in loads)


def _known_by(module: str) -> dict[str, Any]:
    name = "param_group_identifier_keys"
    fits = lambda keys: "wd_mult" in keys and _reads(module, name)
    return {"shape": "names of a param group's values that are read there", "fits": fits}


def _takes(*names: str) -> Callable[[Any], bool]:
    return lambda function: set(names) <= set(inspect.signature(function).parameters)


SEAMS: tuple[Seam, ...] = (
    Wrapped(
        "megatron.training.arguments",
        "add_megatron_arguments",
        "adds the optimizers to --optimizer, their flags and --plugin-device; on the CPU, gloo and "
        "layers without GPU kernels as defaults",
        ("parser",),
        arguments.add_megatron_arguments,
    ),
    Wrapped(
        "megatron.training.arguments",
        "validate_args",
        "checks the flags, refuses what is not supported, sets --clip-grad's default, and keeps "
        "--use-distributed-optimizer, which Megatron turns off for all but adam and sgd",
        ("args", "defaults"),
        arguments.validate_args,
    ),
    Wrapped(
        "megatron.training.arguments",
        "_print_args",
        "lets the printed arguments show the optimizer by its name",
        ("title", "args"),
        arguments.print_args,
    ),
    Wrapped(
        "megatron.training.training",
        "get_megatron_optimizer_config",
        "carries the flags into the optimizer's configuration",
        ("args",),
        build.get_megatron_optimizer_config,
    ),
    Extended(
        "megatron.core.optimizer.optimizer_config",
        "OptimizerConfig",
        "gets a field for each hyperparameter and switch of the plugin",
        configuration.add_fields,
    ),
    Wrapped(
        "megatron.core.optimizer.optimizer_config",
        "OptimizerConfig.__post_init__",
        "checks those fields, sets clip_grad's default, and allows use_precision_aware_optimizer "
        "to the plugin's optimizers, which Megatron allows to adam alone",
        ("self",),
        configuration.post_init,
    ),
    Wrapped(
        "megatron.core.optimizer",
        "get_megatron_optimizer",
        "builds the optimizer over Megatron's main parameters, whole-model and sharded",
        ("config", "model_chunks"),
        build.get_megatron_optimizer,
    ),
    Wrapped(
        "megatron.core.optimizer",
        "_get_megatron_optimizer_based_on_param_groups",
        "counts every optimizer that Megatron builds there, however deep, so that each trainable "
        "parameter is known to be stepped by one",
        ("config", "model_chunks", "param_groups"),
        coverage.build_part,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.state_dict",
        "with --optimizer adam too: lets torch's AdamW load and save before its first step under "
        "the distributed optimizer, without Transformer Engine or Apex",
        ("self",),
        torch_adamw.state_dict,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.load_state_dict",
        "the same: keeps the resumed AdamW from counting a step once for each parameter; and gives "
        "each param group back its own values, also where Megatron takes several for one another",
        ("self", "state_dict"),
        torch_adamw.load_state_dict,
    ),
    Wrapped(
        "megatron.core.optimizer.optimizer",
        "Float16OptimizerWithFloat16Params.load_state_dict",
        "with --optimizer adam too: the same for param groups",
        ("self", "state_dict"),
        param_groups.load_state_dict,
    ),
    Wrapped(
        "megatron.core.optimizer.optimizer",
        "FP32Optimizer.load_state_dict",
        "the same for models in fp32",
        ("self", "state_dict"),
        param_groups.load_state_dict,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._get_main_param_and_optimizer_states",
        "the same: a checkpoint of any format may be saved before the first update",
        ("self", "model_param"),
        torch_adamw.get_main_param_and_optimizer_states,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        "the same, for the checkpoint formats that do not hold AdamW's step beside its averages; "
        "and compares what is loaded as main parameters with the weights",
        ("self", "model_param", "tensors"),
        torch_adamw.set_main_param_and_optimizer_states,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        "with --optimizer adam too: saves what the ranks hold where buckets are padded, of which "
        "Megatron up to 0.19.2 saves other elements (--dist-ckpt-optim-fully-reshardable)",
        ("self", "model_sharded_state_dict", "is_loading"),
        shards.sharded_param_state_fully_reshardable,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.get_parameter_state_dp_reshardable",
        "with --optimizer adam too: lets a rank save whose share of a bucket is padding alone; "
        "zeros between parameters, where Megatron saves memory as it finds it",
        ("self",),
        shards.get_parameter_state_dp_reshardable,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.sharded_param_state_dp_reshardable",
        "the same: lets that rank load",
        ("self", "model_sharded_state_dict", "is_loading"),
        shards.sharded_param_state_dp_reshardable,
    ),
    Wrapped(
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler.load_state_dict",
        "with --optimizer adam too: the first step after --use-checkpoint-opt_param-scheduler has "
        "the checkpoint's weight decay",
        ("self", "state_dict"),
        param_groups.load_schedule,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.optimizer",
        "get_optim_param_to_id_map",
        "with --optimizer adam too: finds a parameter of torch FSDP2's by its own local tensor, "
        "where torch from 2.13 on gives a new one each time",
        ("optim_params_iter",),
        torch_fsdp2.optim_param_to_id_map,
    ),
    Wrapped(
        "megatron.training.global_vars",
        "_set_tensorboard_writer",
        "with --optimizer adam too: goes on without TensorBoard's log where the disk does not take "
        "it, and says so",
        ("args",),
        telemetry.set_tensorboard_writer,
    ),
    Wrapped(
        "megatron.training.training",
        "training_log",
        "with --optimizer adam too: says that a loss is not finite, which Megatron's log leaves "
        "out; with --plugin-log-updates or --plugin-metrics writes the log of each interval",
        (
            *("loss_dict", "total_loss_dict", "learning_rate", "iteration", "loss_scale"),
            *("report_memory_flag", "skipped_iter", "grad_norm"),
        ),
        telemetry.training_log,
    ),
    Wrapped(
        "megatron.training.training",
        "evaluate_and_print_results",
        "with --plugin-log-updates or --plugin-metrics alone: the same for the log of evaluations",
        ("prefix", "forward_step_func", "data_iterator", "model", "iteration"),
        telemetry.evaluate_and_print_results,
    ),
    Wrapped(
        "megatron.training.training",
        "evaluate",
        "the same: the loss of an evaluation",
        ("forward_step_func",),
        telemetry.evaluate,
    ),
    Wrapped(
        "megatron.training.checkpointing",
        "_load_base_checkpoint",
        "with --optimizer adam too: refuses a damaged checkpoint, and another optimizer's state, "
        "before any of it is loaded",
        ("load_dir", "args"),
        loading.load_base_checkpoint,
    ),
    Wrapped(
        "megatron.training.checkpointing",
        "load_checkpoint",
        "with --optimizer adam too: chooses the iteration once, for all that is read of it; a "
        "checkpoint that cannot be read ends the run with status 1, where Megatron ends it with 0",
        ("ddp_model", "optimizer", "opt_param_scheduler"),
        loading.load_checkpoint,
    ),
    Wrapped(
        "megatron.training.checkpointing",
        "read_metadata",
        "with --optimizer adam too: the optimizer's state is of the iteration that was chosen and "
        "checked, where Megatron in the format torch reads the tracker file again",
        ("tracker_filename",),
        loading.read_metadata,
    ),
    Wrapped(
        "megatron.training.checkpointing",
        "preprocess_fsdp_dtensor_state_dict",
        "splits the states of fused weights under Megatron-FSDP by their names, for which Megatron "
        "has Adam's",
        ("args", "raw_state_dict", "model"),
        megatron_fsdp.preprocess_fsdp_dtensor_state_dict,
    ),
    Wrapped(
        "megatron.training.checkpointing",
        "save_checkpoint",
        "with --optimizer adam too: says where and why a checkpoint could not be saved, and does "
        "for torch_dcp and fsdp_dtensor what save does; with --plugin-metrics the spikes so far "
        "are in it",
        ("iteration", "model", "optimizer", "opt_param_scheduler"),
        saving.save_checkpoint,
    ),
    Wrapped(
        "megatron.training.async_utils",
        "maybe_finalize_async_save",
        "with --optimizer adam too: says so of asynchronous saves",
        ("blocking",),
        saving.maybe_finalize_async_save,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "FileSystemWriterAsync.write_preloaded_data",
        "with --optimizer adam too: a failed write does not kill the process that writes "
        "asynchronous checkpoints",
        ("transform_list", "local_proc_idx", "write_bucket"),
        async_writers.write_preloaded_data,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.schedule_async_call",
        "with --optimizer adam too: a save that would wait forever for a dead writer is an error",
        ("self", "async_req"),
        async_writers.schedule_async_call,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.is_current_async_call_done",
        "with --optimizer adam too: a writer that died during a save is an error",
        ("self", "blocking", "no_dist"),
        async_writers.is_current_async_call_done,
    ),
    Wrapped(
        "megatron.core.optimizer.optimizer_cuda_graph",
        "OptimizerCudaGraphWrapper.__call__",
        "counts the steps that a CUDA graph of the optimizer replays",
        ("self",),
        chained.replay,
        optional=True,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.serialization",
        "load",
        "with --optimizer adam too: refuses a damaged checkpoint, and another optimizer's state, "
        "where a program without Megatron's trainer loads it",
        ("sharded_state_dict", "checkpoint_dir"),
        library.load,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.serialization",
        "save",
        "with --optimizer adam too: an iteration that is overwritten is no complete one meanwhile",
        ("sharded_state_dict", "checkpoint_dir"),
        saving.save,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.serialization",
        "save_config",
        "with --optimizer adam too: writes checksums of the files that have none of their own",
        ("config", "checkpoint_dir"),
        saving.save_config,
    ),
    Builtin(
        "megatron.core.msc_utils",
        "open",
        "with --optimizer adam too: replaces latest_checkpointed_iteration.txt whole, so that no "
        "kill and no full disk leaves it empty, and for torch_dcp and fsdp_dtensor does what "
        "save_config does",
        ("file", "mode"),
        saving.open_file,
    ),
    Wrapped(
        "megatron.core.datasets.utils",
        "compile_helpers",
        "with --optimizer adam too: keeps the library that reads datasets where it came built and "
        "there is nothing to make it with, which ends the process in the wheels of 0.17 to 0.19",
        (),
        datasets.compile_helpers,
    ),
    Replaced(
        "megatron.core.optimizer.optimizer",
        "MegatronOptimizer.__init__",
        "steps by the plugin's optimizer and makes its state, in place of the Adam (``optimizer``, "
        "``init_state_fn``) that Megatron built",
        by="build._exchange",
        shape="it to take optimizer and init_state_fn",
        fits=_takes("optimizer", "init_state_fn"),
    ),
    Replaced(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer",
        "names the sharded state in checkpoints, and steps in one pass (the object's class becomes "
        "ElementwiseDistributedOptimizer, or ElementwiseFSDPOptimizer)",
        by="build._exchange",
        **_with(
            *("prepare_grads", "step_with_ready_grads", "zero_grad", "state_dict"),
            *("load_state_dict", "_copy_main_params_to_model_params"),
            *("_copy_model_grads_to_main_grads", "_copy_model_params_to_main_params"),
            *("_get_main_param_and_optimizer_states", "_get_model_param_range_map"),
        ),
    ),
    Replaced(
        "megatron.core.optimizer.optimizer",
        "Float16OptimizerWithFloat16Params",
        "steps in one pass without sharding (it becomes ElementwiseFloat16Optimizer)",
        by="build._exchange",
        **_with(
            *("prepare_grads", "step_with_ready_grads", "zero_grad"),
            *("_copy_main_params_to_model_params", "_copy_model_grads_to_main_grads"),
        ),
    ),
    Replaced(
        "megatron.core.optimizer.optimizer",
        "ChainedOptimizer",
        "computes the gradient norm only where something needs it, counts the updates that are "
        "logged, and says what path a step took (it becomes ElementwiseChainedOptimizer)",
        by="chained.ElementwiseChainedOptimizer.adopt",
        **_with("step", "step_with_ready_grads", "get_grad_norm", "_synchronize_steps"),
    ),
    Replaced(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer",
        "before 0.19: has the states' names where four methods hold Adam's as a constant",
        by="compat_before_0_19._copy",
        shape=f"Adam's names in {', '.join(compat_before_0_19.METHODS)} alone",
        fits=lambda cls: compat_before_0_19.found(cls) == set(compat_before_0_19.METHODS),
        needed=compat_before_0_19.needed,
    ),
    Replaced(
        "megatron.core.transformer.fsdp_dtensor_checkpoint",
        "handle_swiglu_in_state_dict",
        "has the states' names while fused weights are split for Megatron-FSDP, where this and "
        "other functions of the module hold Adam's as a constant",
        by="megatron_fsdp._splitting",
        shape="a function with Adam's two names as a constant",
        fits=lambda function: megatron_fsdp.ADAMS in function.__code__.co_consts,
    ),
    *(
        Replaced(
            module,
            "param_group_identifier_keys",
            "with --optimizer adam too: lets each saved param group be found by its number where "
            "Megatron takes several for one another, while a checkpoint is loaded",
            by="checkpoint.param_groups._marked",
            **_known_by(module),
        )
        for module in (
            "megatron.core.optimizer.optimizer",
            "megatron.core.optimizer.distrib_optimizer",
        )
    ),
    Replaced(
        "megatron.training.global_vars",
        "_GLOBAL_TENSORBOARD_WRITER",
        "with --optimizer adam too: goes on where the disk takes no more of TensorBoard's log",
        by="telemetry.set_tensorboard_writer",
        shape="a global that get_tensorboard_writer returns",
        fits=lambda writer: _reads("megatron.training.global_vars", "_GLOBAL_TENSORBOARD_WRITER"),
    ),
    Replaced(
        "megatron.training.training",
        "get_args",
        "checks the schedule of a job that is planned, and is not running here",
        by="planning.parse._schedule",
        shape="a function that get_optimizer_param_scheduler calls",
        fits=callable,
    ),
)


def install() -> None:
    """Checks every seam, then puts each in place.  Idempotent.

    Seams in ``megatron.training`` are left out where only megatron-core is installed.

    Raises:
        SeamMoved: a seam is not as expected; nothing is wrapped then.
    """
    has_training = importlib.util.find_spec("megatron.training") is not None
    seams = [seam for seam in SEAMS if seam.is_here(has_training)]
    for seam in seams:
        seam.check()
    pairs = [pair for seam in seams if (pair := seam.install()) is not None]
    if not pairs:
        return
    rebind(pairs)
    for text in unreached(pairs):
        say(
            f"{text}, which imported it before megatron_s3.register() and calls Megatron's own. "
            "Call register() before that."
        )
