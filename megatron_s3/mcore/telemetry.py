"""Wrappers of the trainer's logging, evaluation and saving, which also write the plugin's log."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_s3.mcore.arguments.readers import needs_grad_norm, switches
from megatron_s3.mcore.metrics_log import MetricsLog, writing_rank
from megatron_s3.mcore.state import running
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.telemetry.writers import Careful, say_without

__all__ = [
    "evaluate",
    "evaluate_and_print_results",
    "resume",
    "save_checkpoint",
    "set_tensorboard_writer",
    "training_log",
]


def save_checkpoint(original: Callable[..., Any], iteration: int, *rest: Any, **kwargs: Any) -> Any:
    """Wraps Megatron's saving, called on every rank; adds the spikes to the saved arguments.

    The arguments are in a checkpoint of every format. They come from one rank, which may be another
    than the one that has the spikes.
    """
    from megatron.training import checkpointing

    args = checkpointing.get_args()  # `original` calls it, and puts the result into the checkpoint
    if switches(args)["plugin_metrics"]:
        training = running()
        state = [training.spikes]
        if training.metrics is not None and training.metrics.file is not None:
            state = [training.metrics.spikes.state_dict()]
        torch.distributed.broadcast_object_list(state, src=writing_rank())
        args.s3_spikes = state[0]
    return original(iteration, *rest, **kwargs)


def resume(saved: Any) -> None:
    """Restores the spikes from the arguments in a checkpoint, if they are there."""
    running().spikes = getattr(saved, "s3_spikes", None)


def set_tensorboard_writer(original: Callable[..., Any], args: Any) -> Any:
    """Wraps the opening of TensorBoard's log; an error of its disk does not end the training."""
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
    """Wraps Megatron's log of an iteration, called on every rank.

    A gradient norm that was not computed is left out (the optimizer's step returns 0.0 for it).
    """
    from megatron.training import get_args

    args, training = get_args(), running()
    optimizer = training.optimizer()
    # The optimizer's configuration has settings that no flag sets.
    asked = args if optimizer is None else optimizer.config
    if args.optimizer in OPTIMIZERS and not needs_grad_norm(asked):
        grad_norm = None
    if switches(args)["plugin_metrics"]:
        _metrics(args, iteration - 1).count(loss_dict, bool(skipped_iter))
    if iteration % args.log_interval == 0 and not skipped_iter:
        _say_nonfinite(loss_dict, iteration)
    result = original(
        *(loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag),
        *(skipped_iter, grad_norm, *rest),
        **kwargs,
    )
    if training.metrics is not None and iteration % args.log_interval == 0:
        training.metrics.interval(args, iteration, learning_rate, grad_norm)
    return result


def _metrics(args: Any, iteration: int) -> MetricsLog:
    """Returns the log of the run, which this launch begins with its first iteration or evaluation.

    Args:
        args: Megatron's arguments.
        iteration: the last iteration before this launch.
    """
    training = running()
    if training.metrics is None:
        training.metrics = MetricsLog(args, iteration, training.update_log, training.spikes)
    return training.metrics


def _say_nonfinite(loss_dict: dict[str, Tensor], iteration: int) -> None:
    """Prints that a loss is not finite; Megatron's own log leaves such a loss out."""
    if torch.distributed.get_rank() != writing_rank():
        return
    for name, loss in loss_dict.items():
        if not loss.isfinite().all():
            print(
                f"[megatron_s3] {name} of iteration {iteration} is not finite, and parameters may "
                "hold NaN; resume from an earlier checkpoint, without "
                "--no-check-for-nan-in-loss-and-grad",
                flush=True,
            )


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
    """Wraps an evaluation, and passes its iteration and text to :func:`evaluate`."""
    training = running()
    training.evaluating = ("test" if "on test set" in prefix else "valid", iteration)
    try:
        return original(
            *(prefix, forward_step_func, data_iterator, model, iteration, *rest), **kwargs
        )
    finally:
        training.evaluating = (None, 0)


def evaluate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps the evaluation of one text, and writes its loss.

    A launch that resumes after the last iteration only evaluates.  With ``--skip-train`` nothing is
    written, because the log may be that of a training which has gone on from the checkpoint.
    """
    from megatron.training import get_args

    training = running()
    kind, iteration = training.evaluating
    if training.metrics is None and kind is not None:
        asked = get_args()
        if switches(asked)["plugin_metrics"] and not asked.skip_train:
            _metrics(asked, iteration)
    begun = time.perf_counter()
    result = original(*args, **kwargs)
    if training.metrics is not None:
        training.metrics.evaluated(begun, *training.evaluating, result[0])
    return result
