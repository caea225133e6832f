"""The optimizer that Megatron's trainer gets: built as Adam, then given another update rule."""

import contextlib
import importlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)

from megatron_s3.kernels.operands import local
from megatron_s3.mcore import overrides, param_groups, telemetry
from megatron_s3.mcore.arguments import (
    as_adam,
    changes_by_step,
    check_config,
    destination,
    hyperparameters,
    needs_grad_norm,
    say,
    state_dtypes,
    switches,
)
from megatron_s3.mcore.coverage import check, collected
from megatron_s3.mcore.distributed import ElementwiseDistributedOptimizer, sharded_class
from megatron_s3.mcore.megatron_fsdp import ElementwiseFSDPOptimizer
from megatron_s3.mcore.one_pass import ElementwiseFloat16Optimizer
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer
from megatron_s3.optimizers.offload import Offload

__all__ = [
    "ElementwiseChainedOptimizer",
    "get_megatron_optimizer",
    "get_megatron_optimizer_config",
    "replay",
    "restore_step",
]

#: What Megatron's configuration refuses without Transformer Engine's FusedAdam, and has instead.
_WITHOUT_FUSED_ADAM = {
    "use_precision_aware_optimizer": False,
    "main_grads_dtype": torch.float32,
    "main_params_dtype": torch.float32,
    "exp_avg_dtype": torch.float32,
    "exp_avg_sq_dtype": torch.float32,
}


#: The optimizer that was built last.
_latest: Callable[[], "ElementwiseChainedOptimizer | None"] = lambda: None


def restore_step(saved: dict[str, Any]) -> None:
    """Takes the number of steps from a checkpoint whose tensors Megatron loads where they are.

    Under torch FSDP2, in the format torch_dist, an optimizer is given nothing else to load.

    Args:
        saved: the checkpoint's state dict.
    """
    built = _latest()
    if built is None or "optimizer" not in saved:
        return
    optimizer = saved["optimizer"]
    groups = optimizer.get("optimizer", optimizer)["param_groups"]
    step = max(group["step"] for group in groups)  # all of one run's are equal
    for part in built.chained_optimizers:
        if part.optimizer is not None:
            for group in part.optimizer.param_groups:
                group["step"] = step
            if len(groups) == len(part.optimizer.param_groups):
                for group, its in zip(part.optimizer.param_groups, groups, strict=True):
                    if "steps" in its:
                        group["steps"] = its["steps"]
            part.optimizer.counts.load(part.optimizer.param_groups)
            param_groups.restore_scheduled(part.optimizer.param_groups, groups)


def replay(original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a call that replays the optimizer's CUDA graph, which runs no Python: counts the step.

    The call that captures runs the Python of the step that it then replays.
    """
    replays = wrapper.cuda_graph is not None
    result = original(wrapper, *args, **kwargs)
    built = getattr(wrapper.optimizer_step_func, "__self__", None)
    if replays and result[0] and isinstance(built, ElementwiseChainedOptimizer):
        for part in built.chained_optimizers:
            for group in part.optimizer.param_groups if part.optimizer is not None else ():
                group["step"] += 1
    return result


def get_megatron_optimizer_config(original: Callable[..., Any], args: Any) -> Any:
    """Around the step from arguments to configuration: carries the optimizer's own flags over."""
    cls = OPTIMIZERS.get(args.optimizer)
    if cls is None:
        return original(args)
    # Before 0.18 it raises on a name it does not know.
    with as_adam(args), _replaced(args, _WITHOUT_FUSED_ADAM) as asked:
        result = original(args)
    config = result[0] if isinstance(result, tuple) else result
    config.optimizer = args.optimizer
    own = {destination(cls.description, h) for h in cls.description.hyperparameters}
    for name, value in {**asked, **{n: getattr(args, n) for n in own}, **switches(args)}.items():
        setattr(config, name, value)
    # From which --use-mup derives the one of hidden layers, as it does Adam's.
    config.adam_eps = hyperparameters(cls, config).get("eps", config.adam_eps)
    return result


@contextlib.contextmanager
def _replaced(holder: Any, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inside, ``holder`` has these values of what it has; yields its own."""
    own = {name: getattr(holder, name) for name in values if hasattr(holder, name)}
    for name in own:
        setattr(holder, name, values[name])
    try:
        yield own
    finally:
        for name, value in own.items():
            setattr(holder, name, value)


def get_megatron_optimizer(
    original: Callable[..., MegatronOptimizer], config: Any, *args: Any, **kwargs: Any
) -> MegatronOptimizer:
    """Around Megatron's builder: every part of what it built as Adam gets the asked-for rule.

    The exchange comes after the building, so that parameter groups, main parameters, shards and
    loss scaling are Megatron's own in every release; Adam has allocated nothing by then. What
    Megatron built may be one chain of parts or hold several (``MimoModel``).

    Hyperparameters are attributes of ``config`` named as the flags' destinations (``s3_beta``);
    missing ones take the optimizer's defaults. ``config_overrides`` may set them for single
    parameters (:func:`megatron_s3.mcore.overrides.translated`).

    Raises:
        ValueError: before training, on all ranks: an override that would not be in force, or a
            trainable parameter that is not stepped by one optimizer.
    """
    global _latest
    cls = OPTIMIZERS.get(config.optimizer)
    if cls is None:
        return original(config, *args, **kwargs)
    call = dict(zip(("model_chunks", "config_overrides"), args, strict=False)) | kwargs
    chunks = call["model_chunks"]
    check_config(config, getattr(chunks[0], "ddp_config", None), cls)
    asked = overrides.translated(call.get("config_overrides") or {}, cls, config)
    if asked and len(args) > 1:
        args = (chunks, asked, *args[2:])
    elif asked:
        kwargs["config_overrides"] = asked
    _prepare(config)
    # Or Adam is given FusedAdam's arguments, or is one on two devices.
    for_adam: dict[str, Any] = {
        "use_precision_aware_optimizer": False,
        "optimizer_cpu_offload": False,
    }
    no_rate = float("0")  # an object of its own
    if config.lr is None:  # to be set in the groups later; torch's AdamW takes numbers alone
        for_adam["lr"] = no_rate
    with collected() as found, as_adam(config), _replaced(config, for_adam):
        built = original(config, *args, **kwargs)
    check(found, built, chunks, asked)
    stepping = [part.optimizer for part in found if part.optimizer.optimizer is not None]
    for part in stepping:
        if isinstance(part.optimizer, ElementwiseOptimizer):
            continue  # by a builder around Megatron's, which has called this one
        for group in part.optimizer.param_groups:
            group.update({name: None for name, value in group.items() if value is no_rate})
        _exchange(part, cls, config)
    log_updates = bool(getattr(config, "s3_log_updates", False))
    if any(built is part.optimizer for part in found):  # a release that returns it as it is
        built = ChainedOptimizer([built])
    update_log = None
    if isinstance(built, ChainedOptimizer):
        built.__class__ = ElementwiseChainedOptimizer
        if log_updates:
            update_log = telemetry.UpdateLog(stepping, chunks)
        built.update_log = update_log
        _latest = weakref.ref(built)
    elif log_updates:
        raise ValueError(
            f"--s3-log-updates does not know the parts of a {type(built).__name__}, which Megatron "
            "builds for this kind of model. Leave it out."
        )
    telemetry.watch(update_log)
    _announce(stepping, cls, config)
    return built


def _prepare(config: Any) -> None:
    """Settles what Megatron reads of a precision-aware optimizer, as it would for FusedAdam."""
    aware = getattr(config, "use_precision_aware_optimizer", False)
    # Under other recipes Megatron keeps the main parameters, as without it.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = aware and (
        getattr(config, "fp8_recipe", None) in (None, "delayed")
        or getattr(config, "optimizer_cpu_offload", False)
    )
    if aware:
        config.store_param_remainders = False  # whole fp32 main parameters


def _exchange(part: MegatronOptimizer, cls: type[ElementwiseOptimizer], config: Any) -> None:
    adam = part.optimizer
    # What Adam added to its groups (betas, eps, ...) would read as settings of the new optimizer.
    adams_own = set(adam.defaults) - {"lr", "weight_decay"}
    groups = [
        overrides.take_own({k: v for k, v in group.items() if k not in adams_own}, cls)
        | {"params": []}
        for group in adam.param_groups
    ]
    in_graph = getattr(config, "optimizer_cuda_graph", False)
    if in_graph and changes_by_step(cls, hyperparameters(cls, config)):
        raise ValueError(
            f"{cls.description.label} does not support optimizer_cuda_graph with these settings: "
            "bias correction or a ramp changes a number each step that is recorded. Leave one of "
            "the two out."
        )
    optimizer = cls(
        groups,
        lr=config.lr,
        weight_decay=config.weight_decay,
        # A graph of another path would not follow the learning rate.
        fused=False if switches(config)["s3_no_fused"] else (True if in_graph else None),
        state_dtype=state_dtypes(cls, config),
        **hyperparameters(cls, config),
    )
    in_fsdp = _in_megatron_fsdp(part)  # which holds main parameters whatever the optimizer is
    optimizer.master_params = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 and not in_fsdp
    # fp32 shards are views of parameters, which torch refuses to new optimizers; as upstream does,
    # they are put in afterwards.
    for group, adams in zip(optimizer.param_groups, adam.param_groups, strict=True):
        group["params"] = adams["params"]
    if getattr(config, "optimizer_cpu_offload", False):
        optimizer.offload = Offload(
            (param for group in optimizer.param_groups for param in group["params"]),
            config.optimizer_offload_fraction,
            overlap=config.overlap_cpu_optimizer_d2h_h2d,
            pin_grads=config.pin_cpu_grads,
            pin_params=config.pin_cpu_params,
        )
    optimizer.keep_hyperparameters = True
    optimizer.log_path = False  # rank 0 says it
    # A checkpoint of a run that has not updated yet (fp16 skips its first steps) holds the state.
    optimizer.register_state_dict_pre_hook(ElementwiseOptimizer.init_state)
    if in_graph:
        _keep_lr_on_device(optimizer)
        optimizer.register_state_dict_post_hook(_with_lr_as_number)
        optimizer.register_load_state_dict_post_hook(_keep_lr_on_device)
    part.optimizer = optimizer
    part.init_state_fn = _init_state
    if isinstance(part, DistributedOptimizer):
        base = ElementwiseFSDPOptimizer if in_fsdp else ElementwiseDistributedOptimizer
        part.__class__ = sharded_class(cls.description.state, base)
        part.name_main_params()
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        part.__class__ = ElementwiseFloat16Optimizer


def _keep_lr_on_device(optimizer: ElementwiseOptimizer) -> None:
    """Makes every group's lr a tensor: Megatron's scheduler fills it, and a CUDA graph reads it."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], torch.Tensor):
            group["lr"] = torch.tensor(
                group["lr"] or 0.0, dtype=torch.float32, device=torch.cuda.current_device()
            )


def _with_lr_as_number(optimizer: ElementwiseOptimizer, state_dict: dict[str, Any]) -> None:
    """A checkpoint holds the lr as it does without a CUDA graph."""
    for group in state_dict["param_groups"]:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"] = group["lr"].item()


def _init_state(optimizer: ElementwiseOptimizer, config: Any = None) -> None:
    """Megatron's ``init_state_fn``."""
    optimizer.init_state()


class ElementwiseChainedOptimizer(ChainedOptimizer):
    """The whole optimizer of a trainer.

    Upstream's :meth:`step` computes the global gradient norm each time, also where neither clipping
    nor a skip threshold needs it: 4 bytes a parameter, an all-reduce and a host synchronisation.
    Here it computes it where something needs it (:func:`~megatron_s3.mcore.arguments.\
needs_grad_norm`).
    """

    update_log: telemetry.UpdateLog | None = None

    #: Whether rank 0 has said which path its first update took.
    said_path = False

    #: Whether :meth:`step` is running and has no use for the norm.
    _without_grad_norm = False

    def state_dict(self, is_loading: bool = False) -> Any:
        """As upstream, which lacks what torch_dcp asks with; the state is there in either case."""
        return super().state_dict()

    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        """As upstream: the norm of the prepared gradients over all ranks, whoever asks for it."""
        return 0.0 if self._without_grad_norm else super().get_grad_norm()

    @torch.no_grad()
    def step(self) -> tuple[bool, Any, Any]:
        """As upstream.

        Returns:
            Whether the parameters were updated; the gradient norm, 0.0 where it was not computed
            (``config.s3_log_grad_norm = True`` has it computed); the number of zeros, None unless
            ``config.log_num_zeros_in_grad``. Both are None where a gradient overflowed, as
            upstream's.
        """
        self._without_grad_norm = not (self.chained_optimizers and needs_grad_norm(self.config))
        try:
            result = super().step()
        finally:
            self._without_grad_norm = False
        if not self.said_path:
            self._say_path()
        return result

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """As upstream; counted where updates are logged."""
        rates = None if self.update_log is None else self.update_log.rates()
        success = super().step_with_ready_grads()
        if rates is not None and success:
            self.update_log.count(rates)
        return success

    def _synchronize_steps(self) -> Any:
        """As upstream; parts that had nothing to update in some step are brought to the others'.

        Upstream fails there.  Each of their parameters keeps its own number of updates.
        """
        parts = [part.optimizer for part in self.chained_optimizers if part.optimizer is not None]
        groups = [(part, group) for part in parts for group in part.param_groups]
        steps = [group["step"] for _, group in groups if group["params"]]
        for part, group in groups:
            if group["params"] and group["step"] != max(steps):
                part.counts.keep(group)
            group["step"] = max(steps, default=group["step"])
        return max(steps, default=None)

    def _say_path(self) -> None:
        optimizers = [p.optimizer for p in self.chained_optimizers if p.optimizer is not None]
        paths = sorted({o.path for o in optimizers if o.path})
        if not paths:
            return  # no update yet
        self.said_path = True
        for path in paths:
            if "portable" in path and optimizers[0].fused is not False:
                part = "" if path.startswith("portable") else " in part"
                label = optimizers[0].description.label
                say(f"{label} is updated by torch operations{part} ({path})")


def _announce(parts: list[MegatronOptimizer], cls: type[ElementwiseOptimizer], config: Any) -> None:
    """One line: what was built, over how much, how."""
    params = [p for part in parts for g in part.optimizer.param_groups for p in g["params"]]
    sharding = set(map(_sharding, parts))
    groups = [group for part in parts for group in part.optimizer.param_groups]
    asked = hyperparameters(cls, config) | {"weight_decay": config.weight_decay}
    settings = " ".join(
        f"{name}={_either(value, (group[name] for group in groups))}"
        for name, value in asked.items()
    )
    main = {
        torch.float32 if part.optimizer.master_params else p.dtype
        for part in parts
        for g in part.optimizer.param_groups
        for p in g["params"]
    }
    states = ", ".join(
        f"{name} {_name(dtype)}" for name, dtype in state_dtypes(cls, config).items()
    )
    devices = {p.device.type for p in params}
    offloaded = ""
    if getattr(config, "optimizer_cpu_offload", False):
        count = sum(p.numel() for part in parts for p in part.optimizer.offload.params)
        offloaded = f"{count:,} of them kept and updated by the CPU, "
        devices.add("cpu")
    say(
        f"{cls.description.label} with {settings}: "
        f"{sum(local(p).numel() for p in params):,} parameters of rank 0 in "
        f"{', '.join(sorted(map(_name, main)))}, state ({states}) "
        f"{' and '.join(sorted(sharding))}, {offloaded}"
        f"{', '.join(sorted(_path(cls, device, config) for device in devices))}, "
        + (f"clip_grad={config.clip_grad:g}" if config.clip_grad > 0 else "no gradient clipping")
    )


def _either(value: Any, found: Iterable[Any]) -> str:
    """The configuration's value and, where param groups have others, those."""
    others = [other for other in dict.fromkeys(found) if other != value]
    return " or ".join(map(str, [value, *others]))


def _in_megatron_fsdp(part: MegatronOptimizer) -> bool:
    return getattr(getattr(part, "ddp_config", None), "use_megatron_fsdp", False)


def _sharding(part: MegatronOptimizer) -> str:
    if _in_megatron_fsdp(part):
        strategy = part.ddp_config.data_parallel_sharding_strategy
        how = "not sharded" if strategy == "no_shard" else "sharded"
        return f"{how} by Megatron-FSDP ({strategy})"
    if isinstance(part, DistributedOptimizer):
        return f"sharded over {part.data_parallel_group.size()} data-parallel ranks"
    return "not sharded"


def _path(cls: type[ElementwiseOptimizer], device: str, config: Any) -> str:
    """What is tried first on a device; what an update then took is known after it."""
    if switches(config)["s3_no_fused"]:
        return f"portable path on {device} (--s3-no-fused)"
    kernel = cls.description.kernels.get(device)
    if kernel is None:
        return f"portable path on {device}"
    return f"{importlib.import_module(kernel).NAME} on {device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
