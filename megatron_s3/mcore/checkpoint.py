"""Checkpoints: what may be loaded into what, decided before anything is, and whole saves."""

import contextlib
import dataclasses
import functools
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_s3.mcore import build, integrity, shard_files, telemetry, writers
from megatron_s3.mcore.arguments import destination, flag, say, state_dtypes
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.optimizers.description import FORMAT

__all__ = [
    "SaveFailed",
    "load_base_checkpoint",
    "load_checkpoint",
    "maybe_finalize_async_save",
    "open_file",
    "optim_param_to_id_map",
    "read_metadata",
    "save",
    "save_checkpoint",
    "save_config",
]

TRACKER = "latest_checkpointed_iteration.txt"

#: Megatron reads a checkpoint's arguments more than once.
_say_once = functools.cache(say)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the message names the folder and the reason."""


def optim_param_to_id_map(original: Callable[..., Any], optim_params_iter: Any) -> Any:
    """Around the map from parameters to their numbers, whose keys are the ids of local tensors."""
    return original(getattr(param, "_local_tensor", param) for param in optim_params_iter)


def load_base_checkpoint(
    original: Callable[..., Any], load_dir: str | None, args: Any, *rest: Any, **kwargs: Any
) -> Any:
    """Around Megatron's reading of a checkpoint: checks its files, and whose it is.

    Megatron reads the arguments that were saved first (``rank0``), and the tensors afterwards.

    Raises:
        ValueError: the files are damaged, or the optimizer's state is not that of the running
            optimizer.  On all ranks alike, nothing was loaded.
    """
    rank0 = kwargs.get("rank0", rest[0] if rest else False)
    context = kwargs.get("checkpointing_context", rest[2] if len(rest) > 2 else None)
    with _chosen(load_dir, args, context) as choice:
        _check_choice(choice, load_dir, args, rank0)
        result = original(load_dir, args, *rest, **kwargs)
    state_dict, _, release, *_ = result
    saved = (state_dict or {}).get("args")
    if saved is not None and not release:
        _compare_vocabulary(load_dir, args, saved)
    if saved is not None and not release and not args.finetune:
        telemetry.resume(saved)
        if not args.no_load_optim:
            _compare_rates(load_dir, args, saved)
            _compare(load_dir, args, saved)
            if getattr(args, "use_torch_fsdp2", False) and args.ckpt_format == "torch_dist":
                build.restore_step(state_dict)
    return result


def load_checkpoint(
    original: Callable[..., Any], ddp_model: Any, optimizer: Any, *rest: Any, **kwargs: Any
) -> Any:
    """Around Megatron's loading: chooses the iteration once, for all that is read of it.

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
    try:
        with _chosen(load_dir, args, kwargs.get("checkpointing_context")):
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
    _compare_with_weights(ddp_model, optimizer)
    return result


def _compare_with_weights(model: Any, optimizer: Any) -> None:
    """Raises ValueError on all ranks where one has loaded main parameters of other weights."""
    if optimizer is None:
        return
    unlike = shard_files.unlike_weights(optimizer, model if isinstance(model, list) else [model])
    _agree(
        f"the main parameters that were loaded of {unlike[0]} ({len(unlike)} in all on this rank) "
        "are not those of its weights. Megatron-LM up to 0.19.2 saves them so with "
        "--dist-ckpt-optim-fully-reshardable where buckets are padded: such a checkpoint holds "
        "the right weights, and no whole state of the optimizer. Nothing was trained. Load the "
        "weights alone with --no-load-optim, or another iteration with --ckpt-step."
        if unlike
        else None
    )


def _load_dir(args: Any, load_arg: str) -> str | None:
    """The folder that Megatron will load from.

    Raises:
        ValueError: ``--pretrained-checkpoint`` would pass over checkpoints of the run itself.
    """
    from megatron.training import checkpointing

    load_dir, pretrained = getattr(args, load_arg), getattr(args, "pretrained_checkpoint", None)
    if pretrained is None or checkpointing.checkpoint_exists(load_dir):
        return load_dir
    there = _complete(Path(load_dir), args) if load_dir else []
    _agree(
        f"{Path(load_dir, TRACKER)} is missing, and --pretrained-checkpoint would pass over the "
        f"complete checkpoints beside it: {', '.join(map(str, there))}. Nothing was loaded. Write "
        "the one to resume from into that file, or give another folder."
        if there
        else None
    )
    return pretrained


def read_metadata(original: Callable[..., Any], tracker_filename: str) -> Any:
    """Around the reading of a tracker file: the iteration that was chosen, where one was.

    Megatron reads the file again for the optimizer's state in the format torch, whatever
    ``--ckpt-step`` says; and takes a file that says "release" for more than that.
    """
    from megatron.training import global_vars

    step = getattr(global_vars._GLOBAL_ARGS, "ckpt_step", None)
    return (step, False) if step else original(tracker_filename)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The iteration that is read.

    Attributes:
        folder: of it; None where Megatron's own checks are all (``--non-persistent-ckpt-type
            local``, object stores).
        iteration: its number, None of a release.
        persistent: whether it is under ``--load``.
    """

    folder: Path | None
    iteration: int | None
    persistent: bool = True


@contextlib.contextmanager
def _chosen(load_dir: str | None, args: Any, context: Any) -> Iterator[_Choice | None]:
    """Inside, Megatron reads the iteration that is yielded, or says that it starts from nothing.

    So it does where this is entered once more, inside.
    """
    if load_dir is None or "://" in str(load_dir):
        yield None
        return
    choice, error = None, None
    kind = getattr(args, "non_persistent_ckpt_type", None)
    try:
        # First, because its ranks talk to each other.
        local = _local_iteration(context) if kind == "local" else -1
        choice = _choose(Path(load_dir), args, local)
    except (integrity.Damaged, OSError) as caught:
        error = str(caught)
    _agree(error)
    step = getattr(args, "ckpt_step", None)
    if choice is not None:
        args.ckpt_step = choice.iteration
        args.non_persistent_ckpt_type = None if choice.persistent else kind
    try:
        yield choice
    finally:
        args.ckpt_step = step
        args.non_persistent_ckpt_type = kind


def _local_iteration(context: Any) -> int:
    """The newest of ``--non-persistent-ckpt-type local``, -1 without any; for all ranks at once."""
    manager = (context or {}).get("local_checkpoint_manager")
    return -1 if manager is None else manager.find_latest()


def _check_choice(choice: _Choice | None, load_dir: Any, args: Any, first: bool) -> None:
    """Raises ValueError on all ranks unless the iteration has been found undamaged."""
    if choice is None:
        return
    if choice.folder is None:
        _say_once(f"the local checkpoint of iteration {choice.iteration} is loaded unchecked")
        return
    legacy = bool(list(choice.folder.glob("mp_rank_*")))  # --ckpt-format torch
    once = legacy or getattr(args, "ckpt_format", None) == "torch_dcp"
    if first or once:
        _check(choice.folder, Path(load_dir), args, own_file=legacy and not first)


def _choose(load_dir: Path, args: Any, local: int = -1) -> _Choice | None:
    """The iteration that will be read: as Megatron chooses, and what --ckpt-step names before all.

    Args:
        load_dir: of ``--load``.
        args: Megatron's.
        local: the newest one of ``--non-persistent-ckpt-type local``, or -1.

    Raises:
        integrity.Damaged: the tracker file is, or names what is not there.
    """
    step = getattr(args, "ckpt_step", None)
    elsewhere = Path(
        getattr(args, "non_persistent_global_ckpt_dir", None) or load_dir / "non_persistent"
    )
    newest, tracker = local, elsewhere / TRACKER
    if getattr(args, "non_persistent_ckpt_type", None) == "global" and tracker.is_file():
        named = tracker.read_bytes().decode(errors="replace").strip()
        newest = _number(tracker, named, load_dir, args)
    if step:
        persistent = None if newest == step else _named(load_dir, step, "--ckpt-step", args)
    else:
        persistent = _persistent(load_dir, args)
    if newest == -1 or (persistent is not None and newest < (persistent.iteration or 0)):
        return persistent
    if step and newest != step:
        return persistent
    if local != -1:
        return _Choice(None, newest, persistent=False)
    return dataclasses.replace(_named(elsewhere, newest, str(tracker), args), persistent=False)


def _persistent(load_dir: Path, args: Any) -> _Choice | None:
    """Returns what the tracker file names, or the one complete iteration where there is none."""
    tracker = load_dir / TRACKER
    if not tracker.is_file():
        there = _complete(load_dir, args)
        if not there:
            return None
        if len(there) > 1:
            raise integrity.Damaged(
                f"{tracker} is missing, and there are complete checkpoints beside it. "
                + _instead(load_dir, args)
            )
        # Killed between the end of the first save and the file that names it.
        _say_once(f"{tracker} is missing: iteration {there[0]}, the only one there, is complete")
        return _named(load_dir, there[0], "", args)
    named = tracker.read_bytes().decode(errors="replace").strip()
    if named == "release":
        return _Choice(load_dir / "release", None)
    choice = _named(load_dir, _number(tracker, named, load_dir, args), str(tracker), args)
    if os.environ.get("RANK", "0") == "0":
        _say_newer(tracker, int(named), args)
    return choice


def _number(tracker: Path, named: str, load_dir: Path, args: Any) -> int:
    if not (named.isascii() and named.isdecimal()):
        raise integrity.Damaged(
            f"{tracker} names no iteration, but {named[:20]!r}. {_instead(load_dir, args)}"
        )
    return int(named)


def _named(load_dir: Path, iteration: int, source: str, args: Any) -> _Choice:
    folder = load_dir / f"iter_{iteration:07d}"
    if not folder.is_dir():
        raise integrity.Damaged(
            f"{source} names iteration {iteration}, and there is no {folder}. "
            + _instead(load_dir, args)
        )
    return _Choice(folder, iteration)


def _say_newer(tracker: Path, named: int, args: Any) -> None:
    """A job that was killed between a save's end and the tracker file, or an edited tracker."""
    if newer := [str(i) for i in _complete(tracker.parent, args) if i > named]:
        _say_once(
            f"{tracker} names iteration {named}, which is loaded; newer ones are complete: "
            f"{', '.join(newer)}"
        )


def _complete(load_dir: Path, args: Any) -> list[int]:
    """Iterations of which a save has ended, in order."""
    config = _has_config(args)
    found = [
        int(folder.name[5:])
        for folder in load_dir.glob("iter_*")
        if folder.name[5:].isdecimal() and integrity.is_complete(folder, config=config)
    ]
    return sorted(found)


def _has_config(args: Any) -> bool:
    """Whether checkpoints of this format have a ``metadata.json``."""
    return getattr(args, "ckpt_format", None) not in ("torch_dcp", "fsdp_dtensor")


def _instead(load_dir: Path, args: Any, but: Path | None = None) -> str:
    """What to do, at the end of an error."""
    complete = (i for i in _complete(load_dir, args) if load_dir / f"iter_{i:07d}" != but)
    there = ", ".join(map(str, complete))
    if not there:
        return "Nothing was loaded, and no other iteration is complete."
    return f"Nothing was loaded. Choose an iteration with --ckpt-step; complete: {there}."


def _check(folder: Path, load_dir: Path, args: Any, own_file: bool) -> None:
    """Raises ValueError on all ranks if one finds the checkpoint damaged."""
    rank, ranks = 0, 1
    if torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    error, count, began = None, 0, time.monotonic()
    try:
        # Megatron tells other formats from --ckpt-format's by that file.
        config = _has_config(args) and not getattr(args, "auto_detect_ckpt_format", False)
        integrity.check(folder, rank, ranks, config=config)
        if own_file:
            _check_own_file(folder)
        # Before the process groups are there, only the arguments are read.
        left_out = getattr(args, "s3_no_verify_checkpoint", False)
        if not left_out and torch.distributed.is_initialized():
            count = integrity.verify(folder, rank, ranks)
    except (integrity.Damaged, OSError) as caught:
        error = f"{caught}. {_instead(load_dir, args, but=folder)}"
    _agree(error)
    if count:
        seconds = time.monotonic() - began
        say(
            f"{folder} is what was written: {count / 1e9:.3g} GB checked by each of {ranks} ranks "
            f"in {seconds:.1f} s; --s3-no-verify-checkpoint leaves this out"
        )


def _check_own_file(folder: Path) -> None:
    """In the format ``torch`` each rank reads its own file, and others would wait for it."""
    from megatron.training.checkpointing import get_checkpoint_name

    number = folder.name[5:]
    name = get_checkpoint_name(
        str(folder.parent), int(number) if number.isdecimal() else 0, not number.isdecimal()
    )
    if not Path(name).is_file():
        raise integrity.Damaged(f"{name} is missing")


def _agree(error: str | None) -> None:
    """Raises ValueError on all ranks with the error of the first that has one."""
    if torch.distributed.is_initialized():
        errors: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, error)
        error = next(filter(None, errors), None)
    if error:
        raise ValueError(error)


def _compare_vocabulary(load_dir: str, args: Any, saved: Any) -> None:
    """Megatron loads embeddings of another length, with its own new rows, and says nothing."""
    now, then = (getattr(each, "padded_vocab_size", None) for each in (args, saved))
    multiples = [
        getattr(each, "make_vocab_size_divisible_by", 128)
        * getattr(each, "tensor_model_parallel_size", 1)
        for each in (args, saved)
    ]  # where these are equal it is another tokenizer's
    if now and then and now > then and multiples[0] != multiples[1]:
        ranks = args.tensor_model_parallel_size
        advice = f"a --tensor-model-parallel-size that divides {then}"
        if then % ranks == 0:
            advice = f"--make-vocab-size-divisible-by {then // ranks}, which pads to {then}"
        raise ValueError(
            f"{load_dir} holds a vocabulary padded to {then} tokens, and this run pads it to "
            f"{now}: the {now - then} new ones are untrained, and each takes part in the loss. "
            f"Nothing was loaded. Give {advice}."
        )


def _compare_rates(load_dir: str, args: Any, saved: Any) -> None:
    """Megatron compares the schedules too, after all is read, and says what it compares alone."""
    names = ["lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "weight_decay"]
    if getattr(args, "weight_decay_incr_style", "constant") != "constant":  # else they are that
        names += ["start_weight_decay", "end_weight_decay"]
    differing = [
        (f"--{name.replace('_', '-')}", getattr(saved, name), getattr(args, name))
        for name in names
        if hasattr(saved, name) and getattr(saved, name) != getattr(args, name, None)
    ]
    if not differing or getattr(saved, "no_save_optim", False):
        return
    then = " ".join(f"{flag} {value}" for flag, value, _ in differing)
    now = " ".join(f"{flag} {value}" for flag, _, value in differing)
    if getattr(args, "override_opt_param_scheduler", False):
        _say_once(f"{load_dir} was saved with {then}; from here on it is {now}")
    elif getattr(args, "use_checkpoint_opt_param_scheduler", False):
        _say_once(f"{load_dir} was saved with {then}, which stays in force in place of {now}")
    else:
        raise ValueError(
            f"{load_dir} was saved with {then}, and this run has {now}. Nothing was loaded. Give "
            "the same, or say which is to be in force: this run's with "
            "--override-opt_param-scheduler, or the checkpoint's with "
            "--use-checkpoint-opt_param-scheduler."
        )


def _compare(load_dir: str, args: Any, saved: Any) -> None:
    running, written = (getattr(each, "optimizer", "adam") for each in (args, saved))
    if running not in OPTIMIZERS and written not in OPTIMIZERS:
        return  # Megatron's own optimizers: Megatron's own checks
    if getattr(saved, "no_save_optim", False):
        return
    advice = "or load the model's weights alone with --no-load-optim"
    if running != written:
        raise ValueError(
            f"{load_dir} was saved by --optimizer {written}, whose state means nothing to "
            f"--optimizer {running}. Nothing was loaded. Resume with --optimizer {written}, "
            f"{advice}."
        )
    if getattr(saved, "s3_format", 1) > FORMAT:
        raise ValueError(
            f"{load_dir} was saved by a newer megatron_s3, in format {saved.s3_format}: this one "
            f"knows formats up to {FORMAT}. Nothing was loaded. Update megatron_s3, {advice}."
        )
    description = OPTIMIZERS[running].description
    for h in description.hyperparameters:
        now = getattr(args, destination(description, h), h.default)
        then = getattr(saved, destination(description, h), h.default)
        now, then = (h.default if value is None else value for value in (now, then))
        if now == then:
            continue
        if h.fixes_state:
            raise ValueError(
                f"{load_dir} was saved with {flag(description, h)} {then}; its state means "
                f"nothing with {flag(description, h)} {now}. Nothing was loaded. Resume with "
                f"{flag(description, h)} {then}, {advice}."
            )
        _say_once(f"{load_dir} was saved with {h.name}={then}; from here on it is {h.name}={now}")
    now, then = (state_dtypes(OPTIMIZERS[running], each) for each in (args, saved))
    for name in now:
        if now[name] != then[name]:
            _say_once(f"{load_dir} was saved with {name} in {then[name]}: loaded into {now[name]}")


def save(
    original: Callable[..., Any],
    sharded_state_dict: Any,
    checkpoint_dir: Any,
    *rest: Any,
    **kw: Any,
) -> Any:
    """Around Megatron's writing of an iteration: what it overwrites is complete no more.

    Else a kill in the middle would leave new files under an old index that fits them.
    """
    if "://" not in str(checkpoint_dir):
        integrity.reopen(Path(checkpoint_dir))
    return original(sharded_state_dict, checkpoint_dir, *rest, **kw)


def save_config(original: Callable[..., Any], config: Any, checkpoint_dir: Any) -> Any:
    """Around the last file of an iteration, which one rank writes: adds the small files' sums."""
    result = original(config, checkpoint_dir)
    if "://" not in str(checkpoint_dir):
        integrity.seal(Path(checkpoint_dir))
    return result


def open_file(original: Callable[..., Any], file: Any, *rest: Any, **kwargs: Any) -> Any:
    """Around ``open`` where Megatron writes the tracker file: whole, or as it was."""
    mode = rest[0] if rest else kwargs.get("mode", "r")
    if mode == "w" and os.path.basename(str(file)) == TRACKER:
        return _replaced(Path(file))
    return original(file, *rest, **kwargs)


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[io.TextIOBase]:
    part = path.with_name(f".{path.name}.part")
    with open(part, "w") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    _seal_named(path.parent, part.read_text().strip())
    part.replace(path)


def _seal_named(save_dir: Path, named: str) -> None:
    """What :func:`save_config` does, in formats without that file: a save has ended here.

    The index of an asynchronous one has not been written any earlier.
    """
    folder = save_dir / (f"iter_{int(named):07d}" if named.isdecimal() else named)
    if (folder / integrity.INDEX).is_file() and not (folder / integrity.SEAL).is_file():
        integrity.seal(folder)


def save_checkpoint(original: Callable[..., Any], iteration: int, *rest: Any, **kwargs: Any) -> Any:
    """Around Megatron's saving: an error says where and why; and what telemetry adds.

    Raises:
        SaveFailed: the disk did not take it.
    """
    if not (kwargs.get("non_persistent_ckpt") or kwargs.get("release")):
        _reopen(iteration)
    with _saying_why(f"iteration {iteration}"):
        return telemetry.save_checkpoint(original, iteration, *rest, **kwargs)


def _reopen(iteration: int) -> None:
    """What :func:`save` does, where Megatron calls torch's saving itself.

    Torch writes nothing before rank 0 has made the plan, and this is done before that.
    """
    from megatron.training import checkpointing

    args = checkpointing.get_args()
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if first and not _has_config(args) and "://" not in str(args.save):
        integrity.reopen(Path(args.save or "", f"iter_{iteration:07d}"), config=False)


def maybe_finalize_async_save(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around the end of an asynchronous save: as :func:`save_checkpoint`."""
    with _saying_why("a checkpoint"):
        return original(*args, **kwargs)


@contextlib.contextmanager
def _saying_why(what: str) -> Iterator[None]:
    from megatron.training import checkpointing

    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        writers.clear_frames(error)
        args = checkpointing.get_args()
        folder = Path(args.save or "")
        why = None if isinstance(error, SaveFailed) else writers.why_not(folder)
        if why is None:
            raise
        there = _complete(folder, args)
        raise SaveFailed(
            f"{what} could not be saved to {folder}: {why}. "
            + (f"Complete there: iteration {there[-1]}." if there else "Nothing is complete there.")
        ) from None
