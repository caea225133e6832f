"""Reads the model, the arguments and the objects out of a checkpoint, without training.

The ``torch_dist`` format holds whole tensors, whatever the layout of the run was. Reading unpickles
objects of the checkpoint, as Megatron does: read only checkpoints that you trust.
"""

import argparse
import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_s3.errors import MegatronS3Error, no_folder
from megatron_s3.storage import checksums, unpickle
from megatron_s3.storage.errors import Damaged
from megatron_s3.storage.layout import (
    CONFIG,
    TRACKER,
    folder_of,
    is_of_format_torch,
    iteration_of,
)
from megatron_s3.storage.newest import RELEASE, Unclear, newest, saved

__all__ = ["CheckpointError", "arguments", "common", "find", "load_object", "tensors", "threads"]


class CheckpointError(MegatronS3Error, ValueError):
    """Raised if a checkpoint cannot be read; the message names folder, reason and remedy."""


def find(folder: str | Path, iteration: int | None = None) -> Path:
    """Returns the folder of one iteration, ``iter_XXXXXXX``, or of a release, ``release``.

    Args:
        folder: the folder of ``--save``, or the folder of one iteration in it; or the folder that a
            program passed to ``dist_checkpointing.save``, with any name.
        iteration: the iteration; the last one saved if None.

    Raises:
        CheckpointError: there is none, it is incomplete or damaged, or it is not in the format
            ``torch_dist``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {no_folder(folder)}; name the folder of the run's --save")
    is_one = iteration_of(folder) is not None or folder.name == RELEASE
    # A program that uses the library may save to a folder of any name.
    is_one = is_one or (folder / CONFIG).is_file()
    if is_one and not (folder / TRACKER).is_file():
        if iteration not in (None, iteration_of(folder)):
            raise CheckpointError(
                f"{folder} is another iteration than --iteration {iteration}; leave the flag out, "
                f"or use {folder.parent}"
            )
        found = folder
    else:
        if not (saved(folder) or (folder / TRACKER).exists()):
            raise CheckpointError(
                f"{folder}: it holds no checkpoint, neither {TRACKER} nor an iter_XXXXXXX; name "
                "the folder of the run's --save (of a launched run, runs/NAME/checkpoints)"
            )
        found = folder_of(folder, _newest(folder) if iteration is None else iteration)
        if not found.is_dir():
            what = f"{folder / TRACKER} names a release, but {found} does not exist"
            if iteration is not None:
                what = f"{folder}: no iteration {iteration}; {_there(folder)}"
            raise CheckpointError(what)
    if is_of_format_torch(found):
        raise CheckpointError(
            f"{found} is in the format --ckpt-format torch, which only the layout of its run can "
            "read. Run its training command once more, in that layout, with --load "
            f"{found.parent} --ckpt-convert-format torch_dist --ckpt-convert-save FOLDER, and use "
            "FOLDER/torch_dist."
        )
    if not (found / CONFIG).is_file() or not list(found.glob("*.distcp")):
        raise CheckpointError(
            f"{found} is not a complete checkpoint of the format --ckpt-format torch_dist "
            "(metadata.json and *.distcp); choose another iteration, or save in that format"
        )
    _check_files(found)
    return found


def _newest(folder: Path) -> int | None:
    """Returns the iteration to read if none is given; None for a release."""
    try:
        found = newest(folder)
        what = f"{folder}: {TRACKER} names no iteration, so no save has finished"
    except Unclear as error:
        found, what = None, str(error)
    if found is None:
        raise CheckpointError(
            f"{what}; {_there(folder)}. Choose one with --iteration, or use another folder."
        )
    return found if isinstance(found, int) else None


def _there(folder: Path) -> str:
    names = ", ".join(folder_of(folder, each).name for each in saved(folder))
    return f"there are: {names}" if names else "it holds no iter_XXXXXXX"


def threads() -> int:
    """Returns the number of threads for a checkpoint's files: one per processor, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


def _check_files(checkpoint: Path) -> None:
    """Checks that every file of the checkpoint is complete and has its checksum."""
    try:
        checksums.check(checkpoint)
        verify = functools.partial(checksums.verify, checkpoint, of=threads())
        with ThreadPoolExecutor(threads()) as pool:
            list(pool.map(verify, range(threads())))
    except Damaged as error:
        raise CheckpointError(f"{error}. Choose another iteration with --iteration.") from error


def arguments(checkpoint: Path) -> argparse.Namespace:
    """Returns Megatron's arguments of the run that saved a checkpoint.

    Args:
        checkpoint: what :func:`find` returns.

    Raises:
        CheckpointError: it holds none, or needs another release than the installed one.
    """
    args: argparse.Namespace = common(checkpoint)["args"]
    return args


def common(checkpoint: Path) -> dict[str, Any]:
    """Returns the objects of a checkpoint that are not tensors, including the arguments.

    Args:
        checkpoint: what :func:`find` returns.

    Raises:
        CheckpointError: as :func:`arguments`.
    """
    from megatron.core import dist_checkpointing

    try:
        found: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(checkpoint))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint}: the installed megatron-core cannot read its arguments "
            f"({type(error).__name__}: {error}). Use the release of the run."
        ) from error
    if "args" not in found:
        raise CheckpointError(
            f"{checkpoint}: it holds no arguments of the run, which describe the model. Use a "
            "checkpoint that Megatron's trainer saved."
        )
    return found


def load_object(file: BinaryIO) -> Any:
    """Returns an object of a checkpoint, if it has only types that Megatron itself saves.

    Raises:
        ValueError: it has other types or is damaged; none of its code was run.
    """
    from megatron.core.safe_globals import SAFE_GLOBALS

    return unpickle.load(file, SAFE_GLOBALS)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns the model's whole tensors by name in the checkpoint, without the optimizer's.

    Layers are stacked, (layers, ...), under ``decoder.layers.``, or numbered there if Megatron
    saved them separately.

    Args:
        checkpoint: what :func:`find` returns.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not re.match(r"(chained_\d+\.)?opt", name)
    }
    load(found, storage_reader=reader, no_dist=True)
    return found
