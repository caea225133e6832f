"""The list of seams: everything in Megatron-LM that the plugin wraps or replaces.

With one of Megatron's own optimizers a wrapper only calls the original function, unless its
``purpose`` says "with every --optimizer".
"""

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from megatron_s3.log import say
from megatron_s3.mcore import (
    build,
    chained,
    compat_before_0_19,
    configuration,
    datasets,
    megatron_fsdp,
    telemetry,
    torch_adamw,
    torch_fsdp2,
)
from megatron_s3.mcore.arguments import flags, mask, validation
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
    """Returns the check of a class whose objects the plugin gives a subclass: its methods."""
    fits = lambda cls: all(callable(getattr(cls, name, None)) for name in methods)
    return {"shape": f"a class with {', '.join(methods)}", "fits": fits}


def _reads(module: str, name: str) -> bool:
    """Returns whether a function of the module reads the global of that name."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    loads = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    return any(node.id == name for node in loads)


def _known_by(module: str) -> dict[str, Any]:
    name = "param_group_identifier_keys"
    fits = lambda keys: "wd_mult" in keys and _reads(module, name)
    return {"shape": "the names of a param group's values, which the module reads", "fits": fits}


def _takes(*names: str) -> Callable[[Any], bool]:
    return lambda function: set(names) <= set(inspect.signature(function).parameters)


SEAMS: tuple[Seam, ...] = (
    Wrapped(
        "megatron.training.arguments",
        "add_megatron_arguments",
        "adds the plugin's optimizers to --optimizer, and the plugin's flags; for training on the "
        "CPU it sets gloo and layers without GPU kernels as defaults",
        ("parser",),
        flags.add_megatron_arguments,
    ),
    Wrapped(
        "megatron.training.arguments",
        "validate_args",
        "checks the flags, rejects unsupported ones with an error, sets the default of "
        "--clip-grad, and keeps --use-distributed-optimizer on, which Megatron allows only with "
        "adam and sgd",
        ("args", "defaults"),
        validation.validate_args,
    ),
    Wrapped(
        "megatron.training.arguments",
        "_print_args",
        "prints the name of the plugin's optimizer among the arguments",
        ("title", "args"),
        mask.print_args,
    ),
    Wrapped(
        "megatron.training.training",
        "get_megatron_optimizer_config",
        "copies the values of the plugin's flags into the optimizer's configuration",
        ("args",),
        build.get_megatron_optimizer_config,
    ),
    Extended(
        "megatron.core.optimizer.optimizer_config",
        "OptimizerConfig",
        "has a field for each hyperparameter and switch of the plugin",
        configuration.add_fields,
    ),
    Wrapped(
        "megatron.core.optimizer.optimizer_config",
        "OptimizerConfig.__post_init__",
        "checks these fields, sets the default of clip_grad, and allows "
        "use_precision_aware_optimizer with the plugin's optimizers, which Megatron allows only "
        "with adam",
        ("self",),
        configuration.post_init,
    ),
    Wrapped(
        "megatron.core.optimizer",
        "get_megatron_optimizer",
        "builds the plugin's optimizer for Megatron's main parameters, whether or not they are "
        "sharded",
        ("config", "model_chunks"),
        build.get_megatron_optimizer,
    ),
    Wrapped(
        "megatron.core.optimizer",
        "_get_megatron_optimizer_based_on_param_groups",
        "collects every optimizer that Megatron builds, so that the plugin can check that exactly "
        "one of them updates each trainable parameter, and builds the one of the plugin's that "
        "--muon-scalar-optimizer names",
        ("config", "model_chunks", "param_groups"),
        build.build_part,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.state_dict",
        "allows a checkpoint to be loaded or saved before the first step of torch's AdamW, which "
        "Megatron uses without Transformer Engine and Apex (with every --optimizer)",
        ("self",),
        torch_adamw.state_dict,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.load_state_dict",
        "prevents a resumed AdamW from counting a step once for each parameter, and restores each "
        "param group's own values where Megatron confuses groups (with every --optimizer)",
        ("self", "state_dict"),
        torch_adamw.load_state_dict,
    ),
    Wrapped(
        "megatron.core.optimizer.optimizer",
        "Float16OptimizerWithFloat16Params.load_state_dict",
        "restores each param group's own values for fp16 and bf16 models (with every --optimizer)",
        ("self", "state_dict"),
        param_groups.load_state_dict,
    ),
    Wrapped(
        "megatron.core.optimizer.optimizer",
        "FP32Optimizer.load_state_dict",
        "restores each param group's own values for fp32 models (with every --optimizer)",
        ("self", "state_dict"),
        param_groups.load_state_dict,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._get_main_param_and_optimizer_states",
        "allows a checkpoint of any format to be saved before the first update (with every "
        "--optimizer)",
        ("self", "model_param"),
        torch_adamw.get_main_param_and_optimizer_states,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        "loads AdamW's state from checkpoint formats that do not contain its step, and compares "
        "the loaded main parameters with the weights (with every --optimizer)",
        ("self", "model_param", "tensors"),
        torch_adamw.set_main_param_and_optimizer_states,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        "saves the right elements where buckets are padded; Megatron up to 0.19.2 saves others "
        "with --dist-ckpt-optim-fully-reshardable (with every --optimizer)",
        ("self", "model_sharded_state_dict", "is_loading"),
        shards.sharded_param_state_fully_reshardable,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.get_parameter_state_dp_reshardable",
        "allows a rank to save if its shard of a bucket is only padding, and saves zeros between "
        "parameters, where Megatron saves uninitialized memory (with every --optimizer)",
        ("self",),
        shards.get_parameter_state_dp_reshardable,
    ),
    Wrapped(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.sharded_param_state_dp_reshardable",
        "allows a rank to load if its shard of a bucket is only padding (with every --optimizer)",
        ("self", "model_sharded_state_dict", "is_loading"),
        shards.sharded_param_state_dp_reshardable,
    ),
    Wrapped(
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler.load_state_dict",
        "applies the checkpoint's weight decay from the first step on with "
        "--use-checkpoint-opt_param-scheduler (with every --optimizer)",
        ("self", "state_dict"),
        param_groups.load_schedule,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.optimizer",
        "get_optim_param_to_id_map",
        "identifies a parameter under torch FSDP2 by a local tensor that stays the same; torch "
        "from 2.13 on returns a new one at each access (with every --optimizer)",
        ("optim_params_iter",),
        torch_fsdp2.optim_param_to_id_map,
    ),
    Wrapped(
        "megatron.training.global_vars",
        "_set_tensorboard_writer",
        "continues without TensorBoard's log if it cannot be written, and logs this (with every "
        "--optimizer)",
        ("args",),
        telemetry.set_tensorboard_writer,
    ),
    Wrapped(
        "megatron.training.training",
        "training_log",
        "logs that a loss is not finite, which Megatron's log omits, and with "
        "--plugin-log-updates or --plugin-metrics writes the record of each logging interval "
        "(with every --optimizer)",
        (
            *("loss_dict", "total_loss_dict", "learning_rate", "iteration", "loss_scale"),
            *("report_memory_flag", "skipped_iter", "grad_norm"),
        ),
        telemetry.training_log,
    ),
    Wrapped(
        "megatron.training.training",
        "evaluate_and_print_results",
        "writes the record of each evaluation with --plugin-log-updates or --plugin-metrics",
        ("prefix", "forward_step_func", "data_iterator", "model", "iteration"),
        telemetry.evaluate_and_print_results,
    ),
    Wrapped(
        "megatron.training.training",
        "evaluate",
        "keeps the loss of an evaluation for that record",
        ("forward_step_func",),
        telemetry.evaluate,
    ),
    Wrapped(
        "megatron.training.checkpointing",
        "_load_base_checkpoint",
        "rejects a damaged checkpoint, or the state of another optimizer, with an error before "
        "anything is loaded (with every --optimizer)",
        ("load_dir", "args"),
        loading.load_base_checkpoint,
    ),
    Wrapped(
        "megatron.training.checkpointing",
        "load_checkpoint",
        "chooses the iteration once for all files that are read, and ends the run with status 1 if "
        "the checkpoint cannot be read, where Megatron exits with 0 (with every --optimizer)",
        ("ddp_model", "optimizer", "opt_param_scheduler"),
        loading.load_checkpoint,
    ),
    Wrapped(
        "megatron.training.checkpointing",
        "read_metadata",
        "loads the optimizer state from the iteration that was chosen and verified; in the format "
        "torch, Megatron reads the tracker file again (with every --optimizer)",
        ("tracker_filename",),
        loading.read_metadata,
    ),
    Wrapped(
        "megatron.training.checkpointing",
        "preprocess_fsdp_dtensor_state_dict",
        "splits the states of fused weights under Megatron-FSDP by their own names, where Megatron "
        "uses the names of Adam's states",
        ("args", "raw_state_dict", "model"),
        megatron_fsdp.preprocess_fsdp_dtensor_state_dict,
    ),
    Wrapped(
        "megatron.training.checkpointing",
        "save_checkpoint",
        "reports where and why a checkpoint could not be saved, marks an overwritten iteration as "
        "incomplete in the formats torch_dcp and fsdp_dtensor, and with --plugin-metrics saves the "
        "spikes so far (with every --optimizer)",
        ("iteration", "model", "optimizer", "opt_param_scheduler"),
        saving.save_checkpoint,
    ),
    Wrapped(
        "megatron.training.async_utils",
        "maybe_finalize_async_save",
        "reports where and why an asynchronous save failed (with every --optimizer)",
        ("blocking",),
        saving.maybe_finalize_async_save,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "FileSystemWriterAsync.write_preloaded_data",
        "keeps the process that writes asynchronous checkpoints alive after a failed write (with "
        "every --optimizer)",
        ("transform_list", "local_proc_idx", "write_bucket"),
        async_writers.write_preloaded_data,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.schedule_async_call",
        "raises an error instead of waiting forever for a writer that has died (with every "
        "--optimizer)",
        ("self", "async_req"),
        async_writers.schedule_async_call,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.is_current_async_call_done",
        "raises an error if the writer died during a save (with every --optimizer)",
        ("self", "blocking", "no_dist"),
        async_writers.is_current_async_call_done,
    ),
    Wrapped(
        "megatron.core.optimizer.optimizer_cuda_graph",
        "OptimizerCudaGraphWrapper.__call__",
        "counts the optimizer steps that a CUDA graph replays",
        ("self",),
        chained.replay,
        optional=True,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.serialization",
        "load",
        "rejects a damaged checkpoint, or the state of another optimizer, with an error in "
        "programs that do not use Megatron's trainer (with every --optimizer)",
        ("sharded_state_dict", "checkpoint_dir"),
        library.load,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.serialization",
        "save",
        "marks an iteration as incomplete while it is overwritten (with every --optimizer)",
        ("sharded_state_dict", "checkpoint_dir"),
        saving.save,
    ),
    Wrapped(
        "megatron.core.dist_checkpointing.serialization",
        "save_config",
        "writes checksums of the files that do not contain their own (with every --optimizer)",
        ("config", "checkpoint_dir"),
        saving.save_config,
    ),
    Builtin(
        "megatron.core.msc_utils",
        "open",
        "replaces latest_checkpointed_iteration.txt atomically, so that neither a kill nor a full "
        "disk leaves it empty, and writes the checksums in the formats torch_dcp and fsdp_dtensor "
        "(with every --optimizer)",
        ("file", "mode"),
        saving.open_file,
    ),
    Wrapped(
        "megatron.core.datasets.utils",
        "compile_helpers",
        "uses the existing library that reads datasets if it cannot be built; Megatron exits then, "
        "with the wheels of 0.17 to 0.19 (with every --optimizer)",
        (),
        datasets.compile_helpers,
    ),
    Replaced(
        "megatron.core.optimizer.optimizer",
        "MegatronOptimizer.__init__",
        "uses the plugin's optimizer and initializes its state (``optimizer``, "
        "``init_state_fn``), in place of the Adam that Megatron built",
        by="build._exchange",
        shape="it to take the parameters optimizer and init_state_fn",
        fits=_takes("optimizer", "init_state_fn"),
    ),
    Replaced(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer",
        "gives the sharded state its names in checkpoints, and steps in one pass (the object's "
        "class becomes ElementwiseDistributedOptimizer or ElementwiseFSDPOptimizer)",
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
        "steps in one pass without sharding (the object's class becomes "
        "ElementwiseFloat16Optimizer)",
        by="build._exchange",
        **_with(
            *("prepare_grads", "step_with_ready_grads", "zero_grad"),
            *("_copy_main_params_to_model_params", "_copy_model_grads_to_main_grads"),
        ),
    ),
    Replaced(
        "megatron.core.optimizer.optimizer",
        "ChainedOptimizer",
        "computes the gradient norm only if something needs it, counts the logged updates, and "
        "logs which implementation a step used (the class becomes ElementwiseChainedOptimizer)",
        by="chained.ElementwiseChainedOptimizer.adopt",
        **_with("step", "step_with_ready_grads", "get_grad_norm", "_synchronize_steps"),
    ),
    Replaced(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer",
        "uses the names of the optimizer's states in four methods that contain the names of "
        "Adam's as constants, in releases before 0.19",
        by="compat_before_0_19._copy",
        shape=f"the names of Adam's states only in {', '.join(compat_before_0_19.METHODS)}",
        fits=lambda cls: compat_before_0_19.found(cls) == set(compat_before_0_19.METHODS),
        needed=compat_before_0_19.needed,
    ),
    Replaced(
        "megatron.core.optimizer.emerging_optimizers",
        "_EMERGING_OPTIMIZERS",
        "names the optimizer of --muon-scalar-optimizer in Muon's entry of this registry while it "
        "is built, in 0.18, which reads the flag nowhere",
        by="compat_before_0_19.leaves_to",
        shape="a registry whose entries have default_param_overrides",
        fits=lambda entries: all(hasattr(e, "default_param_overrides") for e in entries.values()),
        needed=compat_before_0_19.needed_for_muon,
    ),
    Replaced(
        "megatron.core.transformer.fsdp_dtensor_checkpoint",
        "handle_swiglu_in_state_dict",
        "uses the names of the optimizer's states while it splits fused weights for "
        "Megatron-FSDP; this and other functions of the module contain the names of Adam's as "
        "constants",
        by="megatron_fsdp._splitting",
        shape="a function with the names of Adam's two states as a constant",
        fits=lambda function: megatron_fsdp.ADAMS in function.__code__.co_consts,
    ),
    *(
        Replaced(
            module,
            "param_group_identifier_keys",
            "identifies each saved param group by its number while a checkpoint is loaded, where "
            "Megatron confuses groups (with every --optimizer)",
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
        "continues if TensorBoard's log can no longer be written (with every --optimizer)",
        by="telemetry.set_tensorboard_writer",
        shape="a global that get_tensorboard_writer returns",
        fits=lambda writer: _reads("megatron.training.global_vars", "_GLOBAL_TENSORBOARD_WRITER"),
    ),
    Replaced(
        "megatron.training.training",
        "get_args",
        "checks the schedule of a planned job, which does not run in this process",
        by="planning.parse._schedule",
        shape="a function that get_optimizer_param_scheduler calls",
        fits=callable,
    ),
)


def install() -> None:
    """Checks every seam, then installs all of them.  Another call has no effect.

    Seams in ``megatron.training`` are skipped if only megatron-core is installed.

    Raises:
        SeamMoved: a seam differs from what is expected; then nothing is wrapped.
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
