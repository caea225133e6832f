"""What Megatron's trainer logs beyond its own: the updates, and a log that programs read.

Nothing is exchanged or read back but at the iterations that Megatron logs; there, two all-reduces
of a few kilobytes: of all sums, and of all maxima.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_s3.kernels.operands import local
from megatron_s3.kernels.statistics import FIELDS, LARGEST, Statistics
from megatron_s3.mcore.arguments import hyperparameters, needs_grad_norm
from megatron_s3.mcore.megatron_fsdp import ElementwiseFSDPOptimizer
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.telemetry.parameter_kinds import Layout
from megatron_s3.telemetry.runlog import RunLog, finite
from megatron_s3.telemetry.spike_log import SpikeWatch
from megatron_s3.telemetry.updates import summary, tags
from megatron_s3.telemetry.writers import Careful, say_without
from megatron_s3.version import __version__

__all__ = [
    "UpdateLog",
    "evaluate",
    "evaluate_and_print_results",
    "resume",
    "save_checkpoint",
    "set_tensorboard_writer",
    "training_log",
    "watch",
]


class UpdateLog:
    """Counts the updates of a trainer's optimizers, every parameter of the model once.

    A parameter that several ranks update alike (replicated over data- or tensor-parallel ranks,
    tied between pipeline stages) is counted by one of them.

    Args:
        parts: Megatron's optimizers of this rank, with the plugin's in them.
        model_chunks: of this rank.

    Attributes:
        layout: of the rows.
        steps: updates since the last :meth:`take`.
    """

    def __init__(
        self, parts: Sequence[MegatronOptimizer], model_chunks: Sequence[torch.nn.Module]
    ) -> None:
        self.layout = Layout(_unwrapped(model_chunks[0]).config.num_layers)
        self.steps = 0
        self._optimizers = [part.optimizer for part in parts]
        device = torch.cuda.current_device()
        # One set of rows for each param group, which has its own learning rate.
        groups = max(1, len(self._groups()))
        self._statistics = Statistics(device, groups * self.layout.rows)
        self._squared_rates = [0.0] * groups
        group_of = {p: i for i, group in enumerate(self._groups()) for p in group["params"]}
        rows = _rows(self.layout, model_chunks)
        numel = torch.zeros(self.layout.rows, dtype=torch.float64)
        for part in parts:
            part.optimizer.statistics = self._statistics
            for param, model_param in _pairs(part):
                row = rows[model_param] if _counts(part, model_param) else self.layout.uncounted
                self._statistics.rows[param] = group_of[param] * self.layout.rows + row
                numel[row] += local(param.detach()).numel()
        numel = numel.to(device)
        torch.distributed.all_reduce(numel)
        self._numel = numel.tolist()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def rates(self) -> list[float]:
        """The learning rate of each param group now."""
        return [float(group["lr"] or 0.0) for group in self._groups()]

    def count(self, rates: Sequence[float]) -> None:
        """Counts an update that was made with these :meth:`rates`."""
        self.steps += 1
        for i, rate in enumerate(rates):
            self._squared_rates[i] += rate**2

    def bound(self) -> float | None:
        """Returns what no group's updates exceed; None where one has no bound."""
        bounds = [
            optimizer.description.bound(
                **{h.name: group[h.name] for h in optimizer.description.hyperparameters}
            )
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        ]
        return None if None in bounds else max(bounds, default=None)

    def take(self) -> dict[str, dict]:
        """The interval's :func:`~megatron_s3.telemetry.updates.summary`; collective."""
        by_group = self._statistics.values.view(-1, self.layout.rows, len(FIELDS))
        largest = by_group[:, :, LARGEST].amax(0)
        # The square of each group's learning rate, by its mean over the interval.
        mean_squares = by_group.new_tensor(self._squared_rates) / max(1, self.steps)
        squares = by_group[:, :, FIELDS.index("sum_sq_update")]
        moved = (squares * mean_squares[:, None]).sum(0)
        totals = torch.cat([by_group.sum(0), moved[:, None]], dim=1)
        self._statistics.values.zero_()
        self._squared_rates = [0.0] * len(self._squared_rates)
        handles = [
            torch.distributed.all_reduce(totals, async_op=True),
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, async_op=True),
        ]
        for handle in handles:
            handle.wait()
        totals[:, LARGEST] = largest
        steps, self.steps = self.steps, 0
        return summary(self.layout, totals.tolist(), self._numel, steps)


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    while hasattr(module, "module"):
        module = module.module
    return module


def _rows(layout: Layout, model_chunks: Iterable[torch.nn.Module]) -> dict[Tensor, int]:
    rows = {}
    for chunk in model_chunks:
        model = _unwrapped(chunk)
        # Layers know their number in the whole model; what they are made of is told it as well.
        numbers = {
            name: module.layer_number - 1
            for name, module in model.named_modules()
            if isinstance(getattr(module, "layer_number", None), int)
        }
        for name, param in model.named_parameters():
            places = name.split(".")
            layers = (numbers.get(".".join(places[:i])) for i in range(1, len(places)))
            rows[param] = layout.row(name, next((n for n in layers if n is not None), None))
    return rows


def _pairs(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter of the plugin's optimizer, and the model's that it is or is a part of."""
    if isinstance(part, DistributedOptimizer) and not isinstance(part, ElementwiseFSDPOptimizer):
        mains = part.shard_fp32_from_float16_groups
        if part.optimizer.master_params:
            mains = part.shard_float16_groups
        models = (*part.model_float16_groups, *part.model_fp32_groups)
        mains = (*mains, *part.shard_fp32_groups)
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        models = (*part.float16_groups, *part.fp32_from_fp32_groups)
        mains = (*part.fp32_from_float16_groups, *part.fp32_from_fp32_groups)
    else:
        models = mains = [group["params"] for group in part.optimizer.param_groups]
    for main_group, model_group in zip(mains, models, strict=True):
        yield from zip(main_group, model_group, strict=True)


def _counts(part: MegatronOptimizer, param: Tensor) -> bool:
    """Whether this rank is the one that counts what it updates of a parameter."""
    if not param_is_not_shared(param):
        return False
    if not tensor_parallel.param_is_not_tensor_parallel_duplicate(param):
        return False
    if hasattr(param, "placements"):  # a DTensor's, of Megatron-FSDP or torch FSDP2
        places = zip(param.placements, param.device_mesh.get_coordinate(), strict=True)
        return all(placement.is_shard() or rank == 0 for placement, rank in places)
    if isinstance(part, DistributedOptimizer):
        return getattr(part, "distributed_optimizer_instance_id", 0) == 0
    if getattr(param, "allreduce", True):
        return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    return parallel_state.get_expert_data_parallel_rank() == 0


# ---- the log -------------------------------------------------------------------------------------


class _Log:
    """Of the running training; losses of the interval stay on the device."""

    def __init__(self, args: Any, iteration: int) -> None:
        self.losses: list[Tensor] = []
        self.skipped = 0
        self.timed = -1  # iterations since then; the first has begun before
        self.begun = time.perf_counter()
        self.file = None
        if torch.distributed.get_rank() == _writer():
            self.watch = SpikeWatch()
            if _spikes is not None:
                self.watch.load_state_dict(_spikes)
            self.file = RunLog(args.tensorboard_dir or args.save)
            self.file.write("start", _start(args, iteration))

    def interval(
        self,
        args: Any,
        iteration: int,
        lr: float | None,
        grad_norm: Any,
        update_log: UpdateLog | None,
    ) -> None:
        """Writes a line, and TensorBoard's scalars."""
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        updates = None if update_log is None else update_log.take()
        losses, self.losses = self.losses, []
        now = time.perf_counter()
        seconds, self.begun = now - self.begun, now
        skipped, self.skipped = self.skipped, 0
        timed, self.timed = self.timed, 0
        if self.file is None:
            return
        # An interval whose updates were all skipped has no loss.
        loss = float(torch.stack(losses).mean()) if losses else None
        record = {
            "time": time.time(),
            "iteration": iteration,
            "loss": finite(loss),
            "lr": lr,
            "grad_norm": None if grad_norm is None else finite(float(grad_norm)),
            "tokens": args.consumed_train_samples * args.seq_length,
            "seconds": seconds / timed if timed > 0 else None,
            "skipped": skipped,
        }
        if updates is not None:
            record["updates"] = _finite(updates)
            scalars = tags(updates)
            bound = update_log.bound()
            if bound is not None:
                scalars["update/bound"] = bound
            if writer := get_tensorboard_writer():
                for tag, value in scalars.items():
                    writer.add_scalar(tag, value, iteration)
            if wandb := get_wandb_writer():
                wandb.log(scalars, iteration)
        self.file.write("train", record)
        for spike in self.watch.add(iteration, loss, updates) if loss is not None else ():
            self.file.write("spike", _finite(spike))
        if writer := get_tensorboard_writer():
            writer.add_scalar("spikes/count", self.watch.count, iteration)


def _writer() -> int:
    """The rank that writes, as Megatron's own writers do: it has the loss."""
    return torch.distributed.get_world_size() - 1


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    return finite(values)


def _start(args: Any, iteration: int) -> dict[str, Any]:
    from megatron.training.training import num_floating_point_operations

    cls = OPTIMIZERS.get(args.optimizer)
    names = ("adam_beta1", "adam_beta2", "adam_eps") if args.optimizer == "adam" else ()
    own = hyperparameters(cls, args) if cls else {name: getattr(args, name) for name in names}
    return {
        "time": time.time(),
        "iteration": iteration,
        "optimizer": args.optimizer,
        "label": cls.description.label if cls else args.optimizer,
        "hyperparameters": own
        | {"lr": args.lr, "weight_decay": args.weight_decay, "clip_grad": args.clip_grad},
        "bound": _bound(args) if _update_log is None else _update_log.bound(),
        "seed": args.seed,
        "world_size": args.world_size,
        "global_batch_size": args.global_batch_size,
        "seq_length": args.seq_length,
        "train_iters": args.train_iters,
        # Of an iteration over all ranks, by Megatron's own count.
        "flops": float(num_floating_point_operations(args, args.global_batch_size)),
        "version": __version__,
    }


def _bound(args: Any) -> float | None:
    cls = OPTIMIZERS.get(args.optimizer)
    return cls.description.bound(**hyperparameters(cls, args)) if cls else None


_log: _Log | None = None
_update_log: UpdateLog | None = None
#: Of the checkpoint that was loaded: a state of SpikeWatch.
_spikes: dict[str, Any] | None = None


def watch(update_log: UpdateLog | None) -> None:
    """Makes a log of updates, or none, the one whose totals are written."""
    global _log, _update_log, _spikes
    _log, _update_log, _spikes = None, update_log, None


def save_checkpoint(original: Callable[..., Any], iteration: int, *rest: Any, **kwargs: Any) -> Any:
    """Around Megatron's saving, which every rank calls: the spikes so far go with the arguments.

    Those are in a checkpoint of every format, and are one rank's, which need not be the one that
    has them.
    """
    from megatron.training import checkpointing

    args = checkpointing.get_args()  # what `original` calls, and puts into the checkpoint
    if getattr(args, "s3_metrics", False):
        state = [_spikes]
        if _log is not None and _log.file is not None:
            state = [_log.watch.state_dict()]
        torch.distributed.broadcast_object_list(state, src=_writer())
        args.s3_spikes = state[0]
    return original(iteration, *rest, **kwargs)


def resume(saved: Any) -> None:
    """Takes the spikes so far from the arguments in a checkpoint, if they are there."""
    global _spikes
    _spikes = getattr(saved, "s3_spikes", None)


def set_tensorboard_writer(original: Callable[..., Any], args: Any) -> Any:
    """Around the opening of TensorBoard's log: no disk that takes nothing of it ends a training."""
    from megatron.training import global_vars

    name = f"TensorBoard's log in {args.tensorboard_dir}"
    try:
        result = original(args)
    except OSError as error:
        say_without(name, error)
        return None
    writer = global_vars._GLOBAL_TENSORBOARD_WRITER
    if writer is not None:
        global_vars._GLOBAL_TENSORBOARD_WRITER = Careful(writer, name)
    return result


def training_log(
    original: Callable[..., Any],
    loss_dict: dict[str, Tensor],
    total_loss_dict: dict[str, Tensor],
    learning_rate: float | None,
    iteration: int,
    loss_scale: float,
    report_memory_flag: bool,
    skipped_iter: int,
    grad_norm: Any,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Around Megatron's log of an iteration, which is called on every rank.

    A gradient norm that was not computed is left out: the optimizer's step says 0.0 of it.
    """
    global _log
    from megatron.training import get_args

    args = get_args()
    if args.optimizer in OPTIMIZERS and not needs_grad_norm(args):
        grad_norm = None
    wanted = getattr(args, "s3_metrics", False)
    if wanted:
        if _log is None:
            _log = _Log(args, iteration - 1)
        _log.timed += 1
        if skipped_iter:
            _log.skipped += 1
        elif "lm loss" in loss_dict:
            _log.losses.append(loss_dict["lm loss"].detach().float().reshape(-1).sum())
    if iteration % args.log_interval == 0 and not skipped_iter:
        _say_nonfinite(loss_dict, iteration)
    result = original(
        *(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag),
        *(skipped_iter, grad_norm, *rest),
        **kwargs,
    )
    if wanted and iteration % args.log_interval == 0:
        _log.interval(args, iteration, learning_rate, grad_norm, _update_log)
    return result


def _say_nonfinite(loss_dict: dict[str, Tensor], iteration: int) -> None:
    """On the rank that prints Megatron's log, which leaves such a loss out without a word."""
    if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
        return
    for name, loss in loss_dict.items():
        if not loss.isfinite().all():
            print(
                f"[megatron_s3] {name} of iteration {iteration} is not finite, and parameters may "
                "hold NaN: resume from a checkpoint of before, with "
                "--check-for-nan-in-loss-and-grad",
                flush=True,
            )


_evaluating: ContextVar[tuple[str, int] | None] = ContextVar("evaluating", default=None)


def evaluate_and_print_results(
    original: Callable[..., Any],
    prefix: str,
    forward_step_func: Any,
    data_iterator: Any,
    model: Any,
    iteration: int,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Around an evaluation: tells :func:`evaluate` of which iteration and text it is."""
    token = _evaluating.set(("test" if "on test set" in prefix else "valid", iteration))
    try:
        return original(
            *(prefix, forward_step_func, data_iterator, model, iteration, *rest), **kwargs
        )
    finally:
        _evaluating.reset(token)


def evaluate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around the evaluation of one text: writes its loss."""
    begun = time.perf_counter()
    result = original(*args, **kwargs)
    losses, of = result[0], _evaluating.get()
    if _log is not None:
        _log.begun += time.perf_counter() - begun  # no time of training
        if _log.file is not None and of is not None and losses and "lm loss" in losses:
            loss = finite(losses["lm loss"].item())
            _log.file.write(of[0], {"time": time.time(), "iteration": of[1], "loss": loss})
    return result
