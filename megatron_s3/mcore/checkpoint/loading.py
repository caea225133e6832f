"""Wraps Megatron's loading: one iteration for all that is read, verified, and whose it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_s3.mcore import telemetry, torch_fsdp2
from megatron_s3.mcore.all_ranks import raise_first
from megatron_s3.mcore.checkpoint import differences, library, shards, verification
from megatron_s3.mcore.checkpoint.choice import chosen, complete_ones
from megatron_s3.mcore.state import running
from megatron_s3.storage.layout import TRACKER

__all__ = ["load_base_checkpoint", "load_checkpoint", "read_metadata"]


def load_base_checkpoint(
    original: Callable[..., Any], load_dir: str | None, args: Any, *rest: Any, **kwargs: Any
) -> Any:
    """Wraps Megatron's reading of a checkpoint: checks its files, and whose it is.

    Megatron reads the arguments that were saved first (``rank0``), and the tensors afterwards.

    Raises:
        ValueError: the files are damaged, or the optimizer's state is not that of the running
            optimizer.  On all ranks alike, nothing was loaded.
    """
    rank0 = kwargs.get("rank0", rest[0] if rest else False)
    context = kwargs.get("checkpointing_context", rest[2] if len(rest) > 2 else None)
    with chosen(load_dir, args, context) as choice:
        verification.verify(choice, load_dir, args, rank0)
        with library.checked_already():
            result = original(load_dir, args, *rest, **kwargs)
    state_dict, _, release, *_ = result
    saved = (state_dict or {}).get("args")
    source = load_dir or "the checkpoint"
    if saved is not None and not release:
        differences.compare_vocabularies(source, args, saved)
    if saved is not None and not release and not args.finetune:
        telemetry.resume(saved)
        if not args.no_load_optim:
            differences.compare_rates(source, args, saved)
            differences.compare_optimizers(source, args, saved)
            if getattr(args, "use_torch_fsdp2", False) and args.ckpt_format == "torch_dist":
                torch_fsdp2.restore_step(state_dict)
    return result


def load_checkpoint(
    original: Callable[..., Any], ddp_model: Any, optimizer: Any, *rest: Any, **kwargs: Any
) -> Any:
    """Wraps Megatron's loading: chooses the iteration once, for all that is read of it.

    And Megatron gives up with status 0 where it cannot read something.  A scheduler would take that
    for the end of the training, and start what waits for it.

    Raises:
        ValueError: no iteration can be chosen.  Megatron gave up; not where
            ``--exit-on-missing-checkpoint`` asks for that.  The optimizer's part of the checkpoint
            is not of the model that is in it.
    """
    from megatron.training import checkpointing

    args = checkpointing.get_args()
    load_dir = _load_dir(args, kwargs.get("load_arg", rest[1] if len(rest) > 1 else "load"))
    running().unlike.clear()  # of a load that another program did
    try:
        with chosen(load_dir, args, kwargs.get("checkpointing_context")):
            result = original(ddp_model, optimizer, *rest, **kwargs)
    except SystemExit as end:
        missing = not Path(load_dir or "", TRACKER).is_file()
        if end.code or (args.exit_on_missing_checkpoint and missing):
            raise
        raise ValueError(
            f"{load_dir} could not be loaded, for the reason that Megatron prints above. Choose an "
            "iteration with --ckpt-step, or load the model's weights alone with --no-load-optim "
            "--no-load-rng."
        ) from None
    except AssertionError as error:
        if not str(error).startswith("OptimizerParamScheduler: "):
            raise
        raise ValueError(
            f"{load_dir} was saved with another schedule ({error}). Nothing was trained. Give the "
            "same, or say which is to be in force: this run's with "
            "--override-opt_param-scheduler, or the checkpoint's with "
            "--use-checkpoint-opt_param-scheduler."
        ) from None
    _compare_with_weights(ddp_model)
    return result


def _compare_with_weights(model: Any) -> None:
    """Raises ValueError on all ranks where one has loaded main parameters of other weights."""
    unlike = shards.unlike_weights(model if isinstance(model, list) else [model])
    raise_first(
        f"the main parameters that were loaded of {unlike[0]} ({len(unlike)} in all on this rank) "
        "are not those of its weights. Megatron-LM up to 0.19.2 saves them so with "
        "--dist-ckpt-optim-fully-reshardable where buckets are padded: such a checkpoint holds "
        "the right weights, and no whole state of the optimizer. Nothing was trained. Load the "
        "weights alone with --no-load-optim, or another iteration with --ckpt-step."
        if unlike
        else None
    )


def _load_dir(args: Any, load_arg: str) -> str | None:
    """Returns the folder that Megatron will load from.

    Raises:
        ValueError: ``--pretrained-checkpoint`` would pass over checkpoints of the run itself.
    """
    from megatron.training import checkpointing

    load_dir: str | None = getattr(args, load_arg)
    pretrained: str | None = getattr(args, "pretrained_checkpoint", None)
    if pretrained is None or checkpointing.checkpoint_exists(load_dir):
        return load_dir
    there = complete_ones(Path(load_dir), args) if load_dir else []
    raise_first(
        f"{Path(load_dir or '', TRACKER)} is missing, and --pretrained-checkpoint would pass over "
        f"the complete checkpoints beside it: {', '.join(map(str, there))}. Nothing was loaded. "
        "Write the one to resume from into that file, or give another folder."
        if there
        else None
    )
    return pretrained


def read_metadata(original: Callable[..., Any], tracker_filename: str) -> Any:
    """Wraps the reading of a tracker file: the iteration that was chosen, where one was.

    Megatron reads the file again for the optimizer's state in the format torch, whatever
    ``--ckpt-step`` says; and takes a file that says "release" for more than that.
    """
    from megatron.training import global_vars

    step = getattr(global_vars._GLOBAL_ARGS, "ckpt_step", None)
    return (step, False) if step else original(tracker_filename)
