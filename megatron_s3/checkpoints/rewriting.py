"""Writing of a converted checkpoint's files, several at a time, and their verification."""

import copy
import dataclasses
import os
import pickle
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any, cast

import torch

from megatron_s3.checkpoints import groups, transfer
from megatron_s3.checkpoints.errors import ConvertError, Mismatch
from megatron_s3.checkpoints.source import COMMON, Source
from megatron_s3.checkpoints.transfer import Settings
from megatron_s3.mcore.checkpoint import read
from megatron_s3.storage import checksums, copying
from megatron_s3.storage.copying import Writer
from megatron_s3.storage.layout import INDEX, SEAL

__all__ = ["verify", "write"]

#: Checksums of the source's files: the plugin's, and those of Megatron's --verify-integrity.
_CHECKSUMS = (SEAL, "integrity.json")


def write(
    source: Source, folder: Path, settings: Settings, say: Callable[[str], None]
) -> Counter[str]:
    """Writes the iteration's folder; its index, without which it does not load, comes last.

    Args:
        source: the checkpoint to convert.
        folder: the folder to make.
        settings: the settings of the conversion.
        say: logs a line of progress.

    Returns:
        The numbers of elements converted by state, of archives copied and of bytes.
    """
    folder.mkdir(parents=True)
    counts: Counter[str] = Counter()
    places: dict[Any, Any] = {}
    total = sum(place.length for place in source.index.storage_data.values())
    stop = threading.Event()
    done = dict.fromkeys(source.archives, 0)  # bytes written to each file
    with ThreadPoolExecutor(read.threads()) as pool:
        files = [
            pool.submit(_write_file, source, name, folder, settings, stop, done)
            for name in source.archives
        ]
        try:
            left = set(files)
            while left:
                ended, left = wait(left, timeout=10, return_when="FIRST_EXCEPTION")
                for file in ended:
                    found, at = file.result()
                    counts.update(found)
                    places.update(at)
                if left:
                    say(f"converted {sum(done.values()) / 1e9:.1f} of {total / 1e9:.1f} GB")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    for path in source.folder.iterdir():  # metadata.json and any other files
        if path.name in (INDEX, COMMON, *_CHECKSUMS) or path.suffix == ".distcp":
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    if None in source.parsed:
        torch.save(groups.convert(source.parsed[None], settings), folder / COMMON)
    with open(folder / INDEX, "wb") as index:
        pickle.dump(_index(source.index, places, settings), index)
        index.flush()
        os.fsync(index.fileno())
    checksums.seal(folder)
    return counts


def _write_file(
    source: Source,
    name: str,
    folder: Path,
    settings: Settings,
    stop: threading.Event,
    done: dict[str, int],
) -> tuple[Counter[str], dict[Any, Any]]:
    """Writes one file.

    Returns:
        Counts as in :func:`write`, and each archive's place by its index in the source.
    """
    counts: Counter[str] = Counter()
    places = {}
    with open(folder / name, "wb") as file:
        writer = Writer(file, stop)
        for index in source.archives[name]:
            offset, length = file.tell(), source.place(index).length
            try:
                _write_archive(source, index, writer, settings, counts)
            except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
                if writer.error is not None:  # torch.save raises it as a RuntimeError
                    raise writer.error from None
                raise ConvertError(
                    f"{source.folder / name}: {index.fqn} cannot be read "
                    f"({type(error).__name__}): the checkpoint is damaged. Choose "
                    "another iteration with --iteration."
                ) from error
            places[index] = (name, offset, file.tell() - offset)
            counts["bytes"] += length
            done[name] = counts["bytes"]
        file.flush()
        os.fsync(file.fileno())
    return counts, places


def _write_archive(
    source: Source, index: Any, file: Writer, settings: Settings, counts: Counter[str]
) -> None:
    if index in source.parsed:
        counts["objects"] += 1
        changed = groups.convert(source.parsed[index], settings)
        torch.save(changed, cast(IO[bytes], file))  # it has all methods that torch calls
        return

    def change(tensor: torch.Tensor) -> torch.Tensor:
        counts[transfer.state_of(index.fqn) or ""] += tensor.numel()
        if not tensor.sum().isfinite():
            counts["nonfinite"] += tensor.numel() - int(tensor.isfinite().sum())
        return transfer.convert_tensor(index.fqn, tensor, settings)

    if source.is_tensor(index) and transfer.changes(index.fqn, settings):
        dtype = source.index.state_dict_metadata[index.fqn].properties.dtype
        copying.rewrite(source.archive(index), file, dtype, change)
    else:
        counts["copied"] += 1
        copying.copy(source.archive(index), file)


def _index(old: Any, places: dict[Any, Any], settings: Settings) -> Any:
    """Returns the index with the target's names and the archives' places in the new files."""
    new = copy.copy(old)
    new.state_dict_metadata = {
        transfer.rename(name, settings): entry for name, entry in old.state_dict_metadata.items()
    }
    new.storage_data = {}
    for index, place in old.storage_data.items():
        path, offset, length = places[index]
        renamed = dataclasses.replace(index, fqn=transfer.rename(index.fqn, settings))
        new.storage_data[renamed] = dataclasses.replace(
            place, relative_path=path, offset=offset, length=length
        )
    for name in ("planner_data", "mcore_data"):
        if isinstance(getattr(old, name, None), dict):
            by_name = {transfer.rename(k, settings): v for k, v in getattr(old, name).items()}
            setattr(new, name, by_name)
    # The ranks' plans of the last save, which Megatron may reuse for the next one.
    vars(new).pop("all_local_plans", None)
    return new


def verify(source: Source, folder: Path, settings: Settings) -> None:
    """Reads everything back through the new index.

    Every archive has to be at the place and of the size that the index says, with the checksum that
    its tensor had in memory.  Arguments and param groups are compared as objects.

    Raises:
        Mismatch: the message names the first difference.
    """
    try:
        written = Source(read.find(folder))
    except (ConvertError, read.CheckpointError) as error:
        raise Mismatch(
            f"the converted checkpoint cannot be read back: {error}. Check the disk and convert "
            "again."
        ) from error
    new = {(index.fqn, index.offset, index.index): index for index in written.index.storage_data}
    for old in source.index.storage_data:
        index = new.get((transfer.rename(old.fqn, settings), old.offset, old.index))
        if index is None:
            raise Mismatch(
                f"{folder / INDEX} lacks the place of {old.fqn}; check the disk and convert again"
            )
        if old in source.parsed:
            _compare(source.parsed[old], written.parsed[index], old.fqn, settings)
    if None in source.parsed:
        _compare(source.parsed[None], written.parsed[None], folder / COMMON, settings)


def _compare(old: Any, new: Any, name: Any, settings: Settings) -> None:
    if repr(new) != repr(groups.convert(old, settings)):
        raise Mismatch(f"{name} differs from what was written; check the disk and convert again")
