"""Builds the optimizer: Megatron builds it as Adam, then the plugin replaces the update rule."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)

from megatron_s3.mcore import coverage, muon, overrides, state
from megatron_s3.mcore.announcement import announce, announce_parts
from megatron_s3.mcore.arguments.checks import check_config, check_scalar, check_several
from megatron_s3.mcore.arguments.mask import as_adam, replaced
from megatron_s3.mcore.arguments.names import destination
from megatron_s3.mcore.arguments.readers import (
    hyperparameters,
    in_megatron_fsdp,
    scalar_named,
    state_dtypes,
    switches,
)
from megatron_s3.mcore.arguments.rules import OVERRIDES
from megatron_s3.mcore.chained import ElementwiseChainedOptimizer
from megatron_s3.mcore.configuration import WITHOUT_FUSED_ADAM, settle, settle_precision
from megatron_s3.mcore.coverage import check, collected, parts_of, trainable
from megatron_s3.mcore.distributed import (
    ElementwiseDistributedOptimizer,
    names_in_shards,
    sharded_class,
)
from megatron_s3.mcore.megatron_fsdp import ElementwiseFSDPOptimizer
from megatron_s3.mcore.one_pass import ElementwiseFloat16Optimizer
from megatron_s3.mcore.update_log import UpdateLog
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer
from megatron_s3.optimizers.host import Host
from megatron_s3.optimizers.offload import Offload

__all__ = [
    "build_part",
    "get_megatron_optimizer",
    "get_megatron_optimizer_config",
]


def get_megatron_optimizer_config(original: Callable[..., Any], args: Any) -> Any:
    """Wraps the making of the configuration from arguments: copies the plugin's flags into it."""
    cls = OPTIMIZERS.get(args.optimizer)
    if cls is None:
        return original(args)
    # Before 0.18 Megatron raises an error for names that it does not know.
    with as_adam(args), replaced(args, WITHOUT_FUSED_ADAM) as asked:
        result = original(args)
    config = result[0] if isinstance(result, tuple) else result
    config.optimizer = args.optimizer
    setattr(config, OVERRIDES, getattr(args, OVERRIDES, None))
    own = {destination(cls.description, h) for h in cls.description.hyperparameters}
    for name, value in {**asked, **{n: getattr(args, n) for n in own}, **switches(args)}.items():
        setattr(config, name, value)
    # --use-mup derives the eps of hidden layers from this field.
    config.adam_eps = hyperparameters(cls, config).get("eps", config.adam_eps)
    return result


def get_megatron_optimizer(
    original: Callable[..., MegatronOptimizer], config: Any, *args: Any, **kwargs: Any
) -> MegatronOptimizer:
    """Wraps Megatron's builder: replaces each Adam that it built by the chosen optimizer.

    The plugin replaces them after Megatron has built everything, so that param groups, main
    parameters, shards and loss scaling are Megatron's own in every release. Adam has not allocated
    any state at that point. The result may be one chain of optimizers or contain several
    (``MimoModel``).

    Hyperparameters are fields of ``config`` with the names of the flags' destinations
    (``s3_beta``). ``config_overrides`` may set them for single parameters
    (:func:`megatron_s3.mcore.overrides.translated`).

    Raises:
        ValueError: an override would have no effect, or not exactly one optimizer updates a
            trainable parameter. All ranks raise it before training.
    """
    cls = OPTIMIZERS.get(config.optimizer)
    if cls is None:
        return muon.get_megatron_optimizer(original, config, *args, **kwargs)
    settle(config)  # again, because a program may have set attributes since
    call = dict(zip(("model_chunks", "config_overrides"), args, strict=False)) | kwargs
    chunks = call["model_chunks"]
    ddp_config = getattr(chunks[0], "ddp_config", None)
    given = overrides.with_rules(call.get("config_overrides"), config)
    asked = overrides.translated(given or {}, cls, config)
    classes = overrides.algorithms(asked, cls)
    check_several(config, ddp_config, classes)
    for each in classes:
        check_config(config, ddp_config, each)
    overrides.check_owners(asked, trainable(chunks), cls)
    if asked and len(args) > 1:
        args = (chunks, asked, *args[2:])
    elif asked:
        kwargs["config_overrides"] = asked
    settle_precision(config)
    # Otherwise Megatron passes arguments of FusedAdam to Adam, or builds its hybrid optimizer.
    for_adam: dict[str, Any] = {
        "use_precision_aware_optimizer": False,
        "optimizer_cpu_offload": False,
    }
    no_rate = float("0")  # a distinct object, to recognize it below
    if config.lr is None:  # set in the groups later; torch's AdamW requires a number
        for_adam["lr"] = no_rate
    with collected() as found, as_adam(config), replaced(config, for_adam):
        built = original(config, *args, **kwargs)
    found = found or parts_of(built)  # if Megatron's functions are not wrapped
    check(found, built, chunks, asked)
    stepping = [part.optimizer for part in found if part.optimizer.optimizer is not None]
    for part in stepping:
        if isinstance(part.optimizer, ElementwiseOptimizer):
            continue  # another wrapper of the builder has called this function already
        for group in part.optimizer.param_groups:
            group.update({name: None for name, value in group.items() if value is no_rate})
        _exchange(part, classes, config)
    log_updates = switches(config)["plugin_log_updates"]
    if any(
        built is part.optimizer for part in found
    ):  # some releases do not chain a single optimizer
        built = ChainedOptimizer([built])
    training = state.Training()
    if isinstance(built, ChainedOptimizer):
        if log_updates:
            training.update_log = UpdateLog(stepping, chunks)
        ElementwiseChainedOptimizer.adopt(built, training)
    elif log_updates:
        raise ValueError(
            f"--plugin-log-updates does not know the parts of a {type(built).__name__}, which "
            "Megatron builds for this kind of model. Leave it out."
        )
    state.start(training)
    announce(stepping, cls, config, training)
    if len(classes) > 1 or getattr(config, OVERRIDES, None):
        announce_parts(asked, trainable(chunks), cls, config)
    return built


def build_part(
    original: Callable[..., Any], config: Any, model_chunks: Any, *rest: Any, **kwargs: Any
) -> Any:
    """Wraps the construction of one optimizer from param groups, and records it.

    Megatron's Muon leaves embeddings and all that is no matrix to the optimizer that
    ``muon_scalar_optimizer`` names, and calls this function for it with that name.  If it is one of
    the plugin's, it is built as in :func:`get_megatron_optimizer`.

    Raises:
        ValueError: the optimizer does not support a setting.
    """
    # Within get_megatron_optimizer the name reads "adam", which is Megatron's.
    name = getattr(config, "muon_scalar_optimizer", None)
    cls = scalar_named(name) if config.optimizer == name else None
    if cls is None:
        return coverage.build_part(original, config, model_chunks, *rest, **kwargs)
    check_scalar(config, cls, getattr(model_chunks[0], "ddp_config", None))
    if kwargs.get("skip_megatron_wrapping"):  # it is sharded by layers, without DDP's layout
        raise ValueError(
            f"--muon-scalar-optimizer {cls.description.name} with sharded states needs DDP's "
            "layout of the parameters. Leave --no-use-layer-wise-param-layout out; a program "
            "passes a full_param_layout to DistributedDataParallel."
        )
    with as_adam(config):
        part = coverage.build_part(original, config, model_chunks, *rest, **kwargs)
    if part.optimizer is not None:
        _exchange(part, [cls], config)
        announce([part], cls, config, state.Training())
    return part


def _exchange(
    part: MegatronOptimizer, classes: list[type[ElementwiseOptimizer]], config: Any
) -> None:
    adam, cls = part.optimizer, classes[0]
    # The values that Adam added to its groups (betas, eps) would be settings of the new optimizer.
    adams_own = set(adam.defaults) - {"lr", "weight_decay"}
    groups = [
        overrides.take_own({k: v for k, v in group.items() if k not in adams_own}, cls)
        | {"params": []}
        for group in adam.param_groups
    ]
    in_graph = getattr(config, "optimizer_cuda_graph", False)
    optimizer = cls(
        groups,
        lr=config.lr,
        weight_decay=config.weight_decay,
        # Only the kernel reads the learning rate from the device when a graph is replayed.
        fused=False if switches(config)["plugin_no_fused"] else (True if in_graph else None),
        state_dtype=_dtypes(groups, classes, config),
        **hyperparameters(cls, config),
    )
    in_fsdp = in_megatron_fsdp(part)  # it keeps the main parameters itself
    masters = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 and not in_fsdp
    offloads = getattr(config, "optimizer_cpu_offload", False)
    # Only rank 0 logs which implementation is used.
    optimizer.host = Host(
        master_params=masters,
        remainders=masters and not offloads and getattr(config, "store_param_remainders", False),
        keep_hyperparameters=True,
        log_path=False,
    )
    # torch.optim rejects fp32 shards, which are views of parameters, in a constructor; so they are
    # assigned afterwards, as Megatron does.
    for group, adams in zip(optimizer.param_groups, adam.param_groups, strict=True):
        group["params"] = adams["params"]
    if offloads:
        optimizer.host.offload = Offload(
            (param for group in optimizer.param_groups for param in group["params"]),
            config.optimizer_offload_fraction,
            overlap=config.overlap_cpu_optimizer_d2h_h2d,
            pin_grads=config.pin_cpu_grads,
            pin_params=config.pin_cpu_params,
        )
    # A checkpoint must contain the state even before the first update (fp16 skips some steps).
    optimizer.register_state_dict_pre_hook(_init_state)
    if in_graph:
        _keep_lr_on_device(optimizer)
        optimizer.register_state_dict_post_hook(_with_lr_as_number)
        optimizer.register_load_state_dict_post_hook(_keep_lr_on_device)
    part.optimizer = optimizer
    part.init_state_fn = _init_state
    if isinstance(part, DistributedOptimizer):
        base = ElementwiseFSDPOptimizer if in_fsdp else ElementwiseDistributedOptimizer
        part.__class__ = sharded_class(names_in_shards(optimizer), base)
        part.name_main_params()
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        part.__class__ = ElementwiseFloat16Optimizer


def _dtypes(
    groups: list[dict[str, Any]], classes: list[type[ElementwiseOptimizer]], config: Any
) -> dict[str, torch.dtype]:
    """Returns the dtypes of the states of all algorithms of the groups, by name.

    Raises:
        ValueError: states with the same name would have different dtypes.
    """
    base = classes[0]
    names = {group.get("algorithm", base.description.name) for group in groups}
    found = dict(state_dtypes(base, config))
    for cls in classes[1:]:
        if cls.description.name not in names:
            continue
        for name, dtype in state_dtypes(cls, config).items():
            if found.setdefault(name, dtype) != dtype:
                raise ValueError(
                    f"--exp-avg-dtype and --exp-avg-sq-dtype differ, and {name} is the first state "
                    f"of one optimizer and the second of {cls.description.label}. Give both the "
                    "same dtype."
                )
    return found


def _keep_lr_on_device(optimizer: torch.optim.Optimizer) -> None:
    """Makes each group's lr a tensor, which Megatron's scheduler fills and a CUDA graph reads."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], torch.Tensor):
            group["lr"] = torch.tensor(
                group["lr"] or 0.0, dtype=torch.float32, device=torch.cuda.current_device()
            )


def _with_lr_as_number(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Saves the lr as a number, as in a checkpoint of a run without a CUDA graph."""
    for group in state_dict["param_groups"]:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"] = group["lr"].item()


def _init_state(optimizer: Any, config: Any = None) -> None:
    """Initializes the state; used as Megatron's ``init_state_fn`` and as a hook of torch."""
    optimizer.init_state()
