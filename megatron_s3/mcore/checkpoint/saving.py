"""Wraps Megatron's saving: whole checkpoints, with checksums, and an error that says why not."""

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
    """A checkpoint could not be written; the message names the folder and the reason."""


def save(
    original: Callable[..., Any],
    sharded_state_dict: Any,
    checkpoint_dir: Any,
    *rest: Any,
    **kw: Any,
) -> Any:
    """Wraps Megatron's writing of an iteration: what it overwrites is complete no more.

    Else a kill in the middle would leave new files under an old index that fits them.
    """
    if "://" not in str(checkpoint_dir):
        checksums.reopen(Path(checkpoint_dir))
    return original(sharded_state_dict, checkpoint_dir, *rest, **kw)


def save_config(original: Callable[..., Any], config: Any, checkpoint_dir: Any) -> Any:
    """Wraps the last file of an iteration, which one rank writes: adds the small files' sums."""
    result = original(config, checkpoint_dir)
    if "://" not in str(checkpoint_dir):
        checksums.seal(Path(checkpoint_dir))
    return result


def open_file(original: Callable[..., Any], file: Any, *rest: Any, **kwargs: Any) -> Any:
    """Wraps ``open`` where Megatron writes the tracker file: whole, or as it was."""
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
    """Does what :func:`save_config` does, in formats without that file: a save has ended here.

    The index of an asynchronous one has not been written any earlier.
    """
    folder = folder_of(save_dir, int(named) if named.isdecimal() else None)
    if (folder / INDEX).is_file() and not (folder / SEAL).is_file():
        checksums.seal(folder)


def save_checkpoint(original: Callable[..., Any], iteration: int, *rest: Any, **kwargs: Any) -> Any:
    """Wraps Megatron's saving: an error says where and why; and what telemetry adds.

    Raises:
        SaveFailed: the disk did not take it.
    """
    if not (kwargs.get("non_persistent_ckpt") or kwargs.get("release")):
        _reopen(iteration)
    with _saying_why(f"iteration {iteration}"):
        return telemetry.save_checkpoint(original, iteration, *rest, **kwargs)


def _reopen(iteration: int) -> None:
    """Does what :func:`save` does, where Megatron calls torch's saving itself.

    Torch writes nothing before rank 0 has made the plan, and this is done before that.
    """
    from megatron.training import checkpointing

    args = checkpointing.get_args()
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if first and not has_config(getattr(args, "ckpt_format", None)) and "://" not in str(args.save):
        checksums.reopen(folder_of(Path(args.save or ""), iteration), config=False)


def maybe_finalize_async_save(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps the end of an asynchronous save: as :func:`save_checkpoint`."""
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
            + (f"Complete there: iteration {there[-1]}." if there else "Nothing is complete there.")
        ) from None
