"""Wraps Megatron's saving: writes checksums, and explains why a save failed."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_s3.errors import MegatronS3Error
from megatron_s3.mcore import telemetry
from megatron_s3.mcore.checkpoint import async_writers
from megatron_s3.mcore.checkpoint.choice import complete_ones
from megatron_s3.storage import checksums
from megatron_s3.storage.layout import INDEX, SEAL, TRACKER, folder_of, has_config
from megatron_s3.storage.writable import why_not

__all__ = [
    "SaveFailed",
    "maybe_finalize_async_save",
    "open_file",
    "save",
    "save_checkpoint",
    "save_config",
]


class SaveFailed(MegatronS3Error, RuntimeError):
    """Raised if a checkpoint could not be written; the message names the folder and the reason."""


def save(
    original: Callable[..., Any],
    sharded_state_dict: Any,
    checkpoint_dir: Any,
    *rest: Any,
    **kw: Any,
) -> Any:
    """Wraps Megatron's writing of an iteration: marks an existing one as incomplete first.

    Otherwise a kill during the save would leave new files with the old index and its checksums, and
    the mixture could pass for a complete checkpoint.
    """
    if "://" not in str(checkpoint_dir):
        checksums.reopen(Path(checkpoint_dir))
    return original(sharded_state_dict, checkpoint_dir, *rest, **kw)


def save_config(original: Callable[..., Any], config: Any, checkpoint_dir: Any) -> Any:
    """Wraps the writing of an iteration's last file, by one rank: writes checksums after it."""
    result = original(config, checkpoint_dir)
    if "://" not in str(checkpoint_dir):
        checksums.seal(Path(checkpoint_dir))
    return result


def open_file(original: Callable[..., Any], file: Any, *rest: Any, **kwargs: Any) -> Any:
    """Wraps ``open`` where Megatron writes the tracker file: replaces the file atomically."""
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
    """Writes the checksums as :func:`save_config` does, for formats without a ``metadata.json``.

    Megatron writes the tracker file at the end of a save.  The index of an asynchronous save does
    not exist before that.
    """
    folder = folder_of(save_dir, int(named) if named.isdecimal() else None)
    if (folder / INDEX).is_file() and not (folder / SEAL).is_file():
        checksums.seal(folder)


def save_checkpoint(original: Callable[..., Any], iteration: int, *rest: Any, **kwargs: Any) -> Any:
    """Wraps Megatron's saving: adds the telemetry's state, and explains why a save failed.

    Raises:
        SaveFailed: the folder cannot be written, for example because the disk is full.
    """
    if not (kwargs.get("non_persistent_ckpt") or kwargs.get("release")):
        _reopen(iteration)
    with _saying_why(f"iteration {iteration}"):
        return telemetry.save_checkpoint(original, iteration, *rest, **kwargs)


def _reopen(iteration: int) -> None:
    """Marks an iteration as incomplete, as :func:`save` does, in formats saved by torch directly.

    Only rank 0 does this.  No rank of torch writes a file before rank 0 has made the plan.
    """
    from megatron.training import checkpointing

    args = checkpointing.get_args()
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if first and not has_config(getattr(args, "ckpt_format", None)) and "://" not in str(args.save):
        checksums.reopen(folder_of(Path(args.save or ""), iteration), config=False)


def maybe_finalize_async_save(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps the end of an asynchronous save: explains why it failed.

    Raises:
        SaveFailed: see :func:`save_checkpoint`.
    """
    with _saying_why("a checkpoint"):
        return original(*args, **kwargs)


@contextlib.contextmanager
def _saying_why(what: str) -> Iterator[None]:
    from megatron.training import checkpointing

    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        async_writers.clear_frames(error)
        args = checkpointing.get_args()
        folder = Path(args.save or "")
        why = None if isinstance(error, SaveFailed) else why_not(folder)
        if why is None:
            raise
        there = complete_ones(folder, args)
        raise SaveFailed(
            f"{what} could not be saved to {folder}: {why}. "
            + (
                f"The newest complete checkpoint there is iteration {there[-1]}."
                if there
                else "There is no complete checkpoint."
            )
        ) from None
