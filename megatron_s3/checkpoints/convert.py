"""``megatron-s3 convert``: a checkpoint of AdamW's as one that S3 resumes from, and back.

The files of a ``torch_dist`` checkpoint are rewritten, item by item, several at a time: weights and
main parameters byte for byte, states and param groups as :mod:`~megatron_s3.checkpoints.transfer`
says.  The layout of the shards stays, and the sizes and dtypes of all that is in them: of a tensor
that changes, the elements and their checksum are replaced, block by block, and the rest is copied.
"""

import argparse
import copy
import dataclasses
import json
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_s3.checkpoints import transfer
from megatron_s3.checkpoints.transfer import Settings, TransferError
from megatron_s3.mcore.checkpoint import read
from megatron_s3.storage import checksums, copying
from megatron_s3.storage.copying import Slice, Writer
from megatron_s3.storage.index import read as read_index
from megatron_s3.storage.layout import INDEX, SEAL, TRACKER, iteration_of
from megatron_s3.version import __version__

__all__ = ["ConvertError", "convert", "main"]

_NAMES = {"s3": "S3", "adam": "AdamW"}
_COMMON = "common.pt"
#: Of the files as they were: ours, and that of Megatron's --verify-integrity.
_CHECKSUMS = (SEAL, "integrity.json")


class ConvertError(ValueError):
    """The conversion cannot be made; the message names the file, the reason and what to do."""


class Mismatch(RuntimeError):
    """What was written does not read back as the rule has it."""


def convert(
    checkpoint: str | Path,
    output: str | Path,
    to: str,
    *,
    iteration: int | None = None,
    lr_factor: float | None = None,
    s3: dict[str, Any] | None = None,
) -> dict:
    """Writes ``output``, a folder for ``--load``, whole or not at all; the input is only read.

    Args:
        checkpoint: folder of ``--save``, or of one iteration in it.
        output: folder to make.
        to: ``s3`` or ``adam``.
        iteration: the last one saved if None.
        lr_factor: S3's learning rate over AdamW's; ``transfer.LR_FACTOR`` if None.
        s3: hyperparameters of S3, where they are not its defaults.

    Returns:
        What ``convert.json`` in the output holds.

    Raises:
        ConvertError, read.CheckpointError, TransferError: unusable input; nothing is written.
        Mismatch: what was written reads back wrongly; nothing is left of it.
    """
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise ConvertError(f"{output} exists: choose another folder, or remove it")
    if not output.absolute().parent.is_dir():
        raise ConvertError(f"{output.parent}: no such folder; make it first")
    found = read.find(checkpoint, iteration)
    if iteration_of(found) is None:
        raise ConvertError(
            f"{found} is a release, of which Megatron loads the weights alone: there is nothing to "
            "convert, it loads into any optimizer as it is"
        )
    source = _Source(found)
    _say(f"reading {source.folder}")
    values = source.settings(to, lr_factor, s3)
    _check_room(source, output.absolute().parent)
    _say(
        f"{_NAMES['adam' if to == 's3' else 's3']} -> {_NAMES[to]} after {values.step:,} updates: "
        + _rule(values)
    )
    part = output.absolute().parent / f".{output.name}.{os.getpid()}.part"
    part.mkdir()
    try:
        began = time.monotonic()
        unverified = part / "unverified" / source.folder.name  # where nothing looks for one
        counts = _write(source, unverified, values)
        _verify(source, unverified, values)
        unverified.rename(part / source.folder.name)
        unverified.parent.rmdir()
        seconds = time.monotonic() - began
        record = _record(source, values, counts, seconds)
        (part / "convert.json").write_text(json.dumps(record, indent=2) + "\n")
        iteration_number = str(iteration_of(source.folder))
        (part / TRACKER).write_text(iteration_number)
        checksums.sync(part)
        part.rename(output)
        checksums.sync(output.absolute().parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return record


class _Source:
    """The checkpoint that is read.

    Attributes:
        folder: of its iteration.
        index: its ``.metadata``.
        items: of each file, its items' indices in the order of their places in it.
        parsed: objects that a conversion may change, by their index (None: ``common.pt``).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self.items: dict[str, list] = {}
        for index, place in self.index.storage_data.items():
            if getattr(place, "transform_descriptors", None):
                raise ConvertError(
                    f"{folder / place.relative_path} is compressed "
                    f"({', '.join(place.transform_descriptors)}), which Megatron does not write"
                )
            self.items.setdefault(place.relative_path, []).append(index)
        for found in self.items.values():
            found.sort(key=lambda index: self.index.storage_data[index].offset)
        self.parsed: dict[Any, Any] = {}
        for index in self.index.storage_data:
            if not self.is_tensor(index) and _may_hold_settings(index.fqn):
                with self.open(index) as file:
                    self.parsed[index] = self._load(file, folder / self.place(index).relative_path)
        if (folder / _COMMON).is_file():
            with open(folder / _COMMON, "rb") as file:
                self.parsed[None] = self._load(file, folder / _COMMON)
        self._check_states()

    @staticmethod
    def _load(file: BinaryIO, path: Path) -> Any:
        try:
            return read.load_object(file)
        except ValueError as error:
            raise ConvertError(f"{path} cannot be read: {error}") from error

    def place(self, index: Any) -> Any:
        return self.index.storage_data[index]

    def is_tensor(self, index: Any) -> bool:
        return hasattr(self.index.state_dict_metadata[index.fqn], "chunks")

    def open(self, index: Any) -> Slice:
        place = self.place(index)
        return Slice(self.folder / place.relative_path, place.offset, place.length)

    def _check_states(self) -> None:
        shapes: dict[str, dict[str, Any]] = {}
        for name, entry in self.index.state_dict_metadata.items():
            state = transfer.state_of(name)
            if state is None or not hasattr(entry, "chunks"):
                continue
            dtype = entry.properties.dtype
            if dtype not in (torch.float32, torch.bfloat16):
                raise ConvertError(
                    f"{self.folder}: {name} is {dtype}, and float32 or bfloat16 is expected: "
                    + (
                        "Transformer Engine keeps the rest of a bfloat16 parameter there "
                        "(store_param_remainders), which S3 does not read. Save it from a run "
                        "without --use-precision-aware-optimizer."
                        if "param" in state
                        else "S3 keeps its state in no other. Save it from a run with "
                        "--exp-avg-dtype and --exp-avg-sq-dtype fp32 or bf16."
                    )
                )
            if "param" not in state:
                shapes.setdefault(name.replace(state, "*"), {})[state] = entry.size
        pairs = {frozenset(states) for states in shapes.values()}
        if len(pairs) > 1:
            raise ConvertError(f"{self.folder}: not every parameter has both states")
        self.states = set(*pairs)

    def settings(self, to: str, lr_factor: float | None, s3: dict[str, Any] | None) -> Settings:
        try:
            found = transfer.settings([*self.parsed.values()], to, lr_factor, s3)
        except ValueError as error:
            raise ConvertError(f"{self.folder}: {error}") from error
        old = transfer.OTHER_NAME[to][0]
        if self.states != {"exp_avg", old}:
            raise ConvertError(
                f"{self.folder}: its states are {', '.join(sorted(self.states)) or 'not there'}, "
                f"and exp_avg and {old} are expected in a checkpoint of the format torch_dist"
            )
        return found


def _may_hold_settings(name: str) -> bool:
    return "optimizer" in name or "opt_param_scheduler" in name or name.startswith("common_state")


def _rule(settings: Settings) -> str:
    one, two = settings.corrections
    if settings.to == "s3":
        return (
            f"exp_avg / (1 - {settings.beta1:g}^t) = exp_avg / {one:.6g}, "
            f"exp_pnorm = sqrt(exp_avg_sq / (1 - {settings.beta2:g}^t)) = "
            f"sqrt(exp_avg_sq / {two:.6g})"
        )
    return (
        f"exp_avg * (1 - {settings.beta1:g}^t) = exp_avg * {one:.6g}, "
        f"exp_avg_sq = exp_pnorm^2 * (1 - {settings.beta2:g}^t) = exp_pnorm^2 * {two:.6g}"
    )


def _check_room(source: _Source, folder: Path) -> None:
    needed = sum(file.stat().st_size for file in source.folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free < needed * 1.01:
        raise ConvertError(
            f"{folder} has {free / 1e9:.2f} GB free, and the checkpoint takes "
            f"{needed / 1e9:.2f} GB: choose another folder, or make room"
        )


def _write(source: _Source, folder: Path, settings: Settings) -> Counter:
    """Writes the iteration's folder; its index, without which nothing loads it, last.

    Returns:
        What was done how often.
    """
    folder.mkdir(parents=True)
    counts: Counter = Counter()
    places: dict = {}
    total = sum(place.length for place in source.index.storage_data.values())
    stop = threading.Event()
    done = dict.fromkeys(source.items, 0)  # bytes of each file; its size never changes
    with ThreadPoolExecutor(read.threads()) as pool:
        files = [
            pool.submit(_write_file, source, name, folder, settings, stop, done)
            for name in source.items
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
                    _say(f"{sum(done.values()) / 1e9:.1f} of {total / 1e9:.1f} GB")
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    for path in source.folder.iterdir():  # metadata.json, and what else lies there
        if path.name in (INDEX, _COMMON, *_CHECKSUMS) or path.suffix == ".distcp":
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    if None in source.parsed:
        torch.save(transfer.convert_object(source.parsed[None], settings), folder / _COMMON)
    with open(folder / INDEX, "wb") as file:
        pickle.dump(_index(source.index, places, settings.to), file)
        file.flush()
        os.fsync(file.fileno())
    checksums.seal(folder)
    return counts


def _write_file(
    source: _Source,
    name: str,
    folder: Path,
    settings: Settings,
    stop: threading.Event,
    done: dict[str, int],
) -> tuple[Counter, dict]:
    """Writes one file.

    Returns:
        What was done how often, and each item's place by its index in the source.
    """
    counts: Counter = Counter()
    places = {}
    with open(folder / name, "wb") as file:
        writer = Writer(file, stop)
        for index in source.items[name]:
            offset, length = file.tell(), source.place(index).length
            try:
                _write_item(source, index, writer, settings, counts)
            except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
                if writer.error is not None:  # which torch.save makes a RuntimeError of
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


def _write_item(
    source: _Source, index: Any, file: Writer, settings: Settings, counts: Counter
) -> None:
    if index in source.parsed:
        counts["objects"] += 1
        torch.save(transfer.convert_object(source.parsed[index], settings), file)
        return

    def change(tensor: torch.Tensor) -> torch.Tensor:
        counts[transfer.state_of(index.fqn)] += tensor.numel()
        if not tensor.sum().isfinite():
            counts["nonfinite"] += tensor.numel() - int(tensor.isfinite().sum())
        return transfer.convert_tensor(index.fqn, tensor, settings)

    with source.open(index) as given:
        if source.is_tensor(index) and transfer.changes(index.fqn, settings):
            dtype = source.index.state_dict_metadata[index.fqn].properties.dtype
            copying.rewrite(given, file, dtype, change)
        else:
            counts["copied"] += 1
            copying.copy(given, file, given.length)


def _index(old: Any, places: dict, to: str) -> Any:
    """The index with the target's names, and the items' places in the new files."""
    new = copy.copy(old)
    new.state_dict_metadata = {
        transfer.rename(name, to): entry for name, entry in old.state_dict_metadata.items()
    }
    new.storage_data = {}
    for index, place in old.storage_data.items():
        path, offset, length = places[index]
        renamed = dataclasses.replace(index, fqn=transfer.rename(index.fqn, to))
        new.storage_data[renamed] = dataclasses.replace(
            place, relative_path=path, offset=offset, length=length
        )
    for name in ("planner_data", "mcore_data"):
        if isinstance(getattr(old, name, None), dict):
            by_name = {transfer.rename(k, to): v for k, v in getattr(old, name).items()}
            setattr(new, name, by_name)
    # What each rank had planned to write, with which Megatron may shorten the next save.
    vars(new).pop("all_local_plans", None)
    return new


def _verify(source: _Source, folder: Path, settings: Settings) -> None:
    """Reads everything back through the new index.

    Every item has to be where a loader would look for it, of the size that the index has and with
    the checksum that its tensor had in memory; arguments and param groups are compared as objects.

    Raises:
        Mismatch: naming the first that is wrong.
    """
    try:
        written = _Source(read.find(folder))
    except (ConvertError, read.CheckpointError) as error:
        raise Mismatch(
            f"what was written does not read back: {error}. Check the disk, and convert again."
        ) from error
    new = {(index.fqn, index.offset, index.index): index for index in written.index.storage_data}
    for old in source.index.storage_data:
        index = new.get((transfer.rename(old.fqn, settings.to), old.offset, old.index))
        if index is None:
            raise Mismatch(f"{folder / INDEX} does not say where {old.fqn} is")
        if old in source.parsed:
            _compare(source.parsed[old], written.parsed[index], old.fqn, settings)
    if None in source.parsed:
        _compare(source.parsed[None], written.parsed[None], folder / _COMMON, settings)


def _compare(old: Any, new: Any, name: Any, settings: Settings) -> None:
    if repr(new) != repr(transfer.convert_object(old, settings)):
        raise Mismatch(f"{name} reads back otherwise than it was written")


def _record(source: _Source, settings: Settings, counts: Counter, seconds: float) -> dict:
    new = [transfer.convert_object(found, settings) for found in source.parsed.values()]
    before, after = (
        next(a for found in objects_ for a in transfer.arguments(found))
        for objects_ in (source.parsed.values(), new)
    )
    names = ("optimizer", "lr", "min_lr", "weight_decay", "clip_grad")
    changed = {name: (getattr(before, name), getattr(after, name)) for name in names}
    flags = [f"--optimizer {after.optimizer} --lr {after.lr} --min-lr {after.min_lr}"]
    flags.append(f"--weight-decay {after.weight_decay} --clip-grad {after.clip_grad:g}")
    flags += [
        f"--s3-{name} {value:g}"
        for name, value in settings.s3.items()
        if settings.to == "s3" and name in ("beta", "p") and value != _DEFAULTS[name]
    ]
    size = counts["bytes"]
    elements = counts[transfer.OTHER_NAME[settings.to][0]]
    _say(
        f"{elements:,} elements of {transfer.OTHER_NAME[settings.to][0]} became "
        f"{transfer.OTHER_NAME[settings.to][1]}; exp_avg "
        + ("was rescaled" if counts["exp_avg"] else "is the same")
        + f"; {counts['copied']:,} other items are copied"
    )
    if counts["nonfinite"]:
        _say(f"{counts['nonfinite']:,} elements of the state are not finite, there and here")
    for name, (old, now) in changed.items():
        _say(f"{name}: {old} -> {now}")
    _say(f"read back and compared: {size / 1e9:.3f} GB in {seconds:.1f} s")
    return {
        "checkpoint": str(source.folder.absolute()),
        "iteration": iteration_of(source.folder),
        "to": settings.to,
        "step": settings.step,
        "rule": _rule(settings),
        "lr_factor": settings.lr_factor,
        "changed": changed,
        "elements": elements,
        "nonfinite": counts["nonfinite"],
        "bytes": size,
        "seconds": seconds,
        "flags": " ".join(flags),
        "megatron_s3": __version__,
    }


_DEFAULTS = {h.name: h.default for h in transfer.S3.description.hyperparameters}


def _say(message: str) -> None:
    print(f"[convert] {message}", flush=True)


def main(argv: list[str]) -> int:
    """Runs the command.

    Returns:
        0; 2 after one line on stderr if the input is unusable, 1 if what was written does not read
        back, 130 or 143 if it was interrupted. The output folder is there after 0 alone.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-s3 convert",
        allow_abbrev=False,
        description="Turn a checkpoint of AdamW's into one that S3 resumes from, or back. Weights "
        "and main parameters stay as they are, byte for byte. The index of the checkpoint is "
        "unpickled: convert only what you trust.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="INPUT",
        help="the folder of --save, or of one iteration in it; format torch_dist, any layout",
    )
    parser.add_argument("output", metavar="OUTPUT", help="the folder to make, for --load")
    parser.add_argument("--to", choices=("s3", "adam"), required=True, help="the new optimizer")
    parser.add_argument("--iteration", type=int, metavar="N", help="which (the last one saved)")
    parser.add_argument(
        "--lr-factor",
        type=float,
        metavar="X",
        help="S3's learning rate over AdamW's; lr * weight_decay stays. By default "
        f"{transfer.LR_FACTOR['s3']:g} to S3, which is measured to go well in mid-run, and "
        f"{transfer.LR_FACTOR['adam']:g} to AdamW, as the paper has it between whole runs: give "
        "the same both ways to get back where you were",
    )
    for h in transfer.S3.description.hyperparameters:
        if h.name in ("beta", "p"):
            parser.add_argument(
                f"--s3-{h.name}", type=float, metavar="X", help=f"{h.help} ({h.default:g})"
            )
    args = parser.parse_args(argv)
    given = {"beta": args.s3_beta, "p": args.s3_p}
    s3 = {name: value for name, value in given.items() if value is not None}
    if s3 and args.to != "s3":
        parser.error("--s3-beta and --s3-p are for --to s3: a checkpoint of S3's holds its own")
    if args.lr_factor is not None and not 0 < args.lr_factor < float("inf"):
        parser.error(f"--lr-factor must be positive, not {args.lr_factor:g}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        record = convert(
            args.checkpoint,
            args.output,
            args.to,
            iteration=args.iteration,
            lr_factor=args.lr_factor,
            s3=s3,
        )
    except (ConvertError, TransferError, read.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Mismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"wrote {args.output}; resume with --load {args.output} {record['flags']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
