"""Reads the model, the arguments and the objects out of a checkpoint, without training.

The ``torch_dist`` format holds whole tensors whatever the layout was that saved them.  Reading
unpickles what the checkpoint holds, as Megatron does: read only what you trust.
"""

import argparse
import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_s3.errors import MegatronS3Error
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
    """A checkpoint cannot be read; the message names the folder, the reason and what to do."""


def find(folder: str | Path, iteration: int | None = None) -> Path:
    """Returns the folder of one iteration, ``iter_XXXXXXX``, or of a release, ``release``.

    Args:
        folder: what ``--save`` named, or a folder of one iteration in it; or what a program gave to
            ``dist_checkpointing.save``, whatever it is called.
        iteration: which; the last one saved if None.

    Raises:
        CheckpointError: there is none, it is not complete or damaged,
            or not in the format ``torch_dist``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the one of the run's --save")
    is_one = iteration_of(folder) is not None or folder.name == RELEASE
    # A program that uses the library saves to a folder as it likes.
    is_one = is_one or (folder / CONFIG).is_file()
    if is_one and not (folder / TRACKER).is_file():
        if iteration not in (None, iteration_of(folder)):
            raise CheckpointError(
                f"{folder} is another iteration than --iteration {iteration}: leave the flag out, "
                f"or give {folder.parent}"
            )
        found = folder
    else:
        found = folder_of(folder, _newest(folder) if iteration is None else iteration)
        if not found.is_dir():
            what = f"{folder / TRACKER} names a release, and there is no {found}"
            if iteration is not None:
                what = f"{folder}: no iteration {iteration}; {_there(folder)}"
            raise CheckpointError(what)
    if is_of_format_torch(found):
        raise CheckpointError(
            f"{found} is in the format --ckpt-format torch, which only the layout that saved it "
            "reads. Run its training command once more, in that layout, with "
            f"--load {found.parent} --ckpt-convert-format torch_dist --ckpt-convert-save FOLDER, "
            "and give FOLDER/torch_dist."
        )
    if not (found / CONFIG).is_file() or not list(found.glob("*.distcp")):
        raise CheckpointError(
            f"{found} is not a complete checkpoint of the format --ckpt-format torch_dist "
            "(metadata.json and *.distcp): choose another iteration, or save in that format"
        )
    _check_files(found)
    return found


def _newest(folder: Path) -> int | None:
    """Returns the iteration to read where none is asked for; None: a release."""
    try:
        found = newest(folder)
        what = f"{folder}: {TRACKER} names no iteration, so no save has finished"
    except Unclear as error:
        found, what = None, str(error)
    if found is None:
        raise CheckpointError(
            f"{what}; {_there(folder)}. Choose one with --iteration, or give another folder."
        )
    return found if isinstance(found, int) else None


def _there(folder: Path) -> str:
    names = ", ".join(folder_of(folder, each).name for each in saved(folder))
    return f"there are: {names}" if names else "it holds no iter_XXXXXXX"


def threads() -> int:
    """Returns how many read and write a checkpoint's files: one a processor, 8 at most."""
    return min(8, len(os.sched_getaffinity(0)))


def _check_files(checkpoint: Path) -> None:
    """Checks that every file of the checkpoint is there, whole, and what was written."""
    try:
        checksums.check(checkpoint)
        verify = functools.partial(checksums.verify, checkpoint, of=threads())
        with ThreadPoolExecutor(threads()) as pool:
            list(pool.map(verify, range(threads())))
    except Damaged as error:
        raise CheckpointError(f"{error}. Choose another iteration with --iteration.") from error


def arguments(checkpoint: Path) -> argparse.Namespace:
    """Returns Megatron's arguments of the run that saved it.

    Args:
        checkpoint: what :func:`find` returns.

    Raises:
        CheckpointError: it holds none, or another release than the installed one is needed.
    """
    args: argparse.Namespace = common(checkpoint)["args"]
    return args


def common(checkpoint: Path) -> dict[str, Any]:
    """Returns what of a checkpoint is no tensor, the arguments among it.

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
            f"({type(error).__name__}: {error}). Use the release that saved it."
        ) from error
    if "args" not in found:
        raise CheckpointError(
            f"{checkpoint}: it holds no arguments of the run, so nothing tells what the model is. "
            "Give a checkpoint that Megatron's trainer saved."
        )
    return found


def load_object(file: BinaryIO) -> Any:
    """Returns an object of a checkpoint, if it is of types that Megatron itself saves.

    Raises:
        ValueError: it is not, or is damaged; nothing of it has been run.
    """
    from megatron.core.safe_globals import SAFE_GLOBALS

    return unpickle.load(file, SAFE_GLOBALS)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns the model's tensors, whole, by their names in the checkpoint; not the optimizer's.

    Layers are stacked, (layers, ...), under ``decoder.layers.``, or numbered there where Megatron
    saved them one by one.

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
