"""The log of a run for programs: losses, learning rates, updates and spikes of each interval."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_s3.mcore.arguments.readers import hyperparameters
from megatron_s3.mcore.arguments.rules import OVERRIDES
from megatron_s3.mcore.update_log import UpdateLog
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.telemetry.runlog import RunLog, finite
from megatron_s3.telemetry.spike_log import SpikeLog
from megatron_s3.telemetry.updates import tags
from megatron_s3.version import __version__

__all__ = ["MetricsLog", "trainers_flops", "writing_rank"]


def _trainers_writers() -> tuple[Any, Any]:
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    return get_tensorboard_writer(), get_wandb_writer()


def trainers_flops(args: Any) -> float:
    """Returns the floating-point operations of one step over all ranks, as Megatron counts them."""
    from megatron.training.training import num_floating_point_operations

    return float(num_floating_point_operations(args, args.global_batch_size))


class MetricsLog:
    """Writes ``metrics.jsonl`` and TensorBoard's scalars; losses of an interval stay on the device.

    Args:
        args: Megatron's arguments, or an object with the same attributes.
        iteration: the iteration before the first that is logged.
        update_log: the log whose totals are written; None if updates are not logged.
        spikes: the state of SpikeLog in the checkpoint that was loaded.
        writers: returns the writers of TensorBoard and of Weights & Biases, each or None; those of
            Megatron's trainer by default.
        flops: returns the floating-point operations of an iteration over all ranks, from ``args``;
            as Megatron's trainer counts them by default.
    """

    def __init__(
        self,
        args: Any,
        iteration: int,
        update_log: UpdateLog | None,
        spikes: dict[str, Any] | None,
        writers: Callable[[], tuple[Any, Any]] = _trainers_writers,
        flops: Callable[[Any], float | None] = trainers_flops,
    ) -> None:
        self.update_log = update_log
        self.writers = writers
        self.losses: list[Tensor] = []
        self.skipped = 0
        self.timed = -1  # iterations since then; the first one began before
        self.begun = time.perf_counter()
        self.file = None
        if torch.distributed.get_rank() == writing_rank():
            self.spikes = SpikeLog()
            if spikes is not None:
                self.spikes.load_state_dict(spikes)
            self.file = RunLog(args.tensorboard_dir or args.save)
            self.file.write("start", _start(args, iteration, update_log, flops))

    def count(self, losses: dict[str, Tensor], skipped: bool) -> None:
        """Counts an iteration."""
        self.timed += 1
        if skipped:
            self.skipped += 1
        elif "lm loss" in losses:
            self.losses.append(losses["lm loss"].detach().float().reshape(-1).sum())

    def evaluated(
        self, begun: float, kind: str | None, iteration: int, losses: dict[str, Any] | None
    ) -> None:
        """Writes the loss of an evaluation, and leaves its time out of the training time.

        Args:
            begun: start of the evaluation, by ``time.perf_counter``.
            kind: valid or test; None for an evaluation outside of the trainer.
            iteration: the iteration after which it ran.
            losses: losses by name.
        """
        self.begun += time.perf_counter() - begun
        if self.file is not None and kind is not None and losses and "lm loss" in losses:
            loss = finite(losses["lm loss"].item())
            self.file.write(kind, {"time": time.time(), "iteration": iteration, "loss": loss})

    def interval(self, args: Any, iteration: int, lr: float | None, grad_norm: Any) -> None:
        """Writes the line of an interval, and TensorBoard's scalars."""
        updates = None if self.update_log is None else self.update_log.take()
        losses, self.losses = self.losses, []
        now = time.perf_counter()
        seconds, self.begun = now - self.begun, now
        skipped, self.skipped = self.skipped, 0
        timed, self.timed = self.timed, 0
        if self.file is None:
            return
        tensorboard, wandb = self.writers()
        # An interval in which all updates were skipped has no loss.
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
        if self.update_log is not None and updates is not None:
            record["updates"] = _finite(updates)
            scalars = tags(updates)
            bound = self.update_log.bound()
            if bound is not None:
                scalars["update/bound"] = bound
            if tensorboard:
                for tag, value in scalars.items():
                    tensorboard.add_scalar(tag, value, iteration)
            if wandb:
                wandb.log(scalars, iteration)
        self.file.write("train", record)
        for spike in self.spikes.add(iteration, loss, updates) if loss is not None else ():
            self.file.write("spike", _finite(spike))
        if tensorboard:
            tensorboard.add_scalar("spikes/count", self.spikes.count, iteration)


def writing_rank() -> int:
    """Returns the rank that writes: the same as Megatron's writers, because it has the loss."""
    return torch.distributed.get_world_size() - 1


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    return finite(values)


def _start(
    args: Any,
    iteration: int,
    update_log: UpdateLog | None,
    flops: Callable[[Any], float | None],
) -> dict[str, Any]:
    label, bound = args.optimizer, None
    if cls := OPTIMIZERS.get(args.optimizer):
        own = hyperparameters(cls, args)
        label, bound = cls.description.label, cls.description.bound(**own)
    else:
        names = ("adam_beta1", "adam_beta2", "adam_eps") if args.optimizer == "adam" else ()
        own = {name: getattr(args, name) for name in names}
    return {
        "time": time.time(),
        "iteration": iteration,
        "optimizer": args.optimizer,
        "label": label,
        "hyperparameters": own
        | {"lr": args.lr, "weight_decay": args.weight_decay, "clip_grad": args.clip_grad},
        "overrides": getattr(args, OVERRIDES, None) or [],
        "bound": bound if update_log is None else update_log.bound(),
        "seed": args.seed,
        "world_size": args.world_size,
        "global_batch_size": args.global_batch_size,
        "seq_length": args.seq_length,
        "train_iters": args.train_iters,
        "flops": flops(args),
        "version": __version__,
    }
