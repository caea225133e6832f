"""Wraps Megatron's loading: chooses the iteration once, verifies it, checks its optimizer."""

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
    """Wraps Megatron's reading of a checkpoint: checks its files and which optimizer saved it.

    Megatron can call this twice: first for the saved arguments (``rank0``), then for the tensors.

    Raises:
        ValueError: the files are damaged, or the optimizer state belongs to another optimizer than
            the running one or is missing.  All ranks raise it before anything is loaded.
    """
    rank0 = kwargs.get("rank0", rest[0] if rest else False)
    context = kwargs.get("checkpointing_context", rest[2] if len(rest) > 2 else None)
    with chosen(load_dir, args, context) as choice:
        verification.verify(choice, load_dir, args, rank0)
        with library.checked_already():
            result = original(load_dir, args, *rest, **kwargs)
    state_dict, _, release, *_ = result
    saved, error = (state_dict or {}).get("args"), None
    if saved is not None and not release:
        try:
            used = differences.in_force(saved, state_dict.get("opt_param_scheduler"))
            _compare(load_dir or "the checkpoint", args, used)
        except ValueError as caught:
            error = str(caught)
    raise_first(error)
    if saved is not None and not release and not args.finetune:
        telemetry.resume(saved)
        fsdp2 = getattr(args, "use_torch_fsdp2", False) and args.ckpt_format == "torch_dist"
        if fsdp2 and not args.no_load_optim:
            torch_fsdp2.restore_step(state_dict)
    return result


def _compare(source: str, args: Any, saved: Any) -> None:
    differences.compare_vocabularies(source, args, saved)
    if args.finetune:
        return
    differences.refuse_missing(source, args, saved)
    if not args.no_load_optim:
        differences.compare_experts(source, args, saved)
        differences.compare_rates(source, args, saved)
        differences.compare_optimizers(source, args, saved)


def load_checkpoint(
    original: Callable[..., Any], ddp_model: Any, optimizer: Any, *rest: Any, **kwargs: Any
) -> Any:
    """Wraps Megatron's loading: chooses the iteration once, for all files that are read.

    It also replaces Megatron's exit with status 0 by an error.  A scheduler would take that status
    for the end of the training, and start dependent jobs.

    Raises:
        ValueError: no iteration can be chosen, Megatron could not read the checkpoint (unless it is
            missing and ``--exit-on-missing-checkpoint`` is given), it was saved with another
            schedule, or its main parameters do not belong to its weights.
    """
    from megatron.training import checkpointing

    args = checkpointing.get_args()
    load_dir = _load_dir(args, kwargs.get("load_arg", rest[1] if len(rest) > 1 else "load"))
    running().unlike.clear()  # left from an earlier load
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
            f"{load_dir} was saved with another schedule ({error}). Nothing was trained. Use the "
            "same schedule, or choose this run's with --override-opt_param-scheduler, or the "
            "checkpoint's with --use-checkpoint-opt_param-scheduler."
        ) from None
    _compare_with_weights(ddp_model)
    return result


def _compare_with_weights(model: Any) -> None:
    """Raises ValueError on all ranks if one has main parameters that differ from its weights."""
    unlike = shards.unlike_weights(model if isinstance(model, list) else [model])
    raise_first(
        f"the loaded main parameters of {unlike[0]} differ from its weights ({len(unlike)} such "
        "parameters on this rank). Megatron-LM up to 0.19.2 saves wrong elements with "
        "--dist-ckpt-optim-fully-reshardable where buckets are padded: the weights in such a "
        "checkpoint are correct, but its optimizer state is incomplete. Nothing was trained. Load "
        "the weights alone with --no-load-optim, or another iteration with --ckpt-step."
        if unlike
        else None
    )


def _load_dir(args: Any, load_arg: str) -> str | None:
    """Returns the folder from which Megatron will load.

    Raises:
        ValueError: Megatron would load ``--pretrained-checkpoint`` although the run's own folder
            contains complete checkpoints.
    """
    from megatron.training import checkpointing

    load_dir: str | None = getattr(args, load_arg)
    pretrained: str | None = getattr(args, "pretrained_checkpoint", None)
    if pretrained is None or checkpointing.checkpoint_exists(load_dir):
        return load_dir
    there = complete_ones(Path(load_dir), args) if load_dir else []
    raise_first(
        f"{Path(load_dir or '', TRACKER)} is missing, and --pretrained-checkpoint would be "
        "loaded instead of the complete checkpoints in the same folder: "
        f"{', '.join(map(str, there))}. Nothing was loaded. "
        "Write the iteration to resume from into that file, or give another folder."
        if there
        else None
    )
    return pretrained


def read_metadata(original: Callable[..., Any], tracker_filename: str) -> Any:
    """Wraps the reading of a tracker file: returns the chosen iteration, if one was chosen.

    In the format torch, Megatron reads the file again for the optimizer state and ignores
    ``--ckpt-step``.

    Returns:
        The iteration, and whether the checkpoint is a release.
    """
    from megatron.training import global_vars

    step = getattr(global_vars._GLOBAL_ARGS, "ckpt_step", None)
    return (step, False) if step else original(tracker_filename)
