"""``megatron-s3 convert``: conversion of AdamW's checkpoints to S3's, and back.

The files of a ``torch_dist`` checkpoint are rewritten archive by archive, several files at a time.
Weights and main parameters are copied byte for byte, optimizer states are converted by
:mod:`~megatron_s3.checkpoints.transfer`, arguments and param groups by
:mod:`~megatron_s3.checkpoints.groups`.  The layout of the shards stays the same, and so do the size
and dtype of every tensor: only the elements of a converted tensor and their checksum are replaced,
block by block.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_s3.checkpoints import groups, rates, rewriting, transfer
from megatron_s3.checkpoints.errors import ConvertError, Mismatch
from megatron_s3.checkpoints.source import Source
from megatron_s3.checkpoints.transfer import ADAM, Settings
from megatron_s3.errors import no_folder
from megatron_s3.log import say_here
from megatron_s3.mcore.arguments.names import destination, flag
from megatron_s3.mcore.checkpoint import read
from megatron_s3.optimizers.description import Description, Hyperparameter
from megatron_s3.storage import checksums
from megatron_s3.storage.layout import TRACKER, iteration_of
from megatron_s3.storage.newest import RELEASE
from megatron_s3.version import __version__

__all__ = ["convert", "main"]


def convert(
    checkpoint: str | Path,
    output: str | Path,
    to: str,
    *,
    iteration: int | None = None,
    lr_factor: float | None = None,
    hyperparameters: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes ``output``, a folder for ``--load``, atomically; the input is only read.

    Args:
        checkpoint: the folder of ``--save``, or of one iteration in it; or the folder of
            ``dist_checkpointing.save``, where a program without Megatron's trainer called it.
        output: the folder to make, which holds what the input's does.
        to: ``adam``, or an optimizer whose description defines the conversion from AdamW.
        iteration: the iteration to convert; the last one saved if None.
        lr_factor: the ratio of the other optimizer's learning rate to AdamW's; the default of its
            description if None.
        hyperparameters: hyperparameters of the target that differ from its defaults.

    Returns:
        The content of ``convert.json`` in the output.

    Raises:
        ConvertError, read.CheckpointError: the input is unusable; nothing is written.
        Mismatch: the output differs from what was to be written; it is removed.
    """
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise ConvertError(f"{output} exists: choose another folder, or remove it")
    if not output.absolute().parent.is_dir():
        raise ConvertError(f"{output.parent}: {no_folder(output.parent)}; make it first")
    found = read.find(checkpoint, iteration)
    if found.name == RELEASE:
        raise ConvertError(
            f"{found} is a release, from which Megatron loads the weights alone: it loads into any "
            "optimizer without a conversion"
        )
    if output.absolute().parent.resolve().is_relative_to(found.resolve()):
        raise ConvertError(
            f"{output} is in {found}, which is copied as a whole: choose a folder outside of it"
        )
    source = Source(found)
    say_here(f"reading {source.folder}")
    values = source.settings(to, lr_factor, hyperparameters)
    _check_room(source, output.absolute().parent)
    say_here(
        f"converting {' to '.join(values.labels)} after {values.step:,} updates: {values.rule}"
    )
    part = output.absolute().parent / f".{output.name}.{os.getpid()}.part"
    part.mkdir()
    try:
        began = time.monotonic()
        unverified = part / "unverified" / source.folder.name  # where no program looks for one
        counts = rewriting.write(source, unverified, values, say_here)
        rewriting.verify(source, unverified, values)
        seconds = time.monotonic() - began
        record = _record(source, values, counts, seconds)
        made = part
        if iteration_of(source.folder) is None:  # a program without Megatron's trainer saved it
            made = unverified
        else:
            unverified.rename(part / source.folder.name)
            unverified.parent.rmdir()
            (part / TRACKER).write_text(str(iteration_of(source.folder)))
        (made / "convert.json").write_text(json.dumps(record, indent=2) + "\n")
        checksums.sync(made)
        made.rename(output)
        checksums.sync(output.absolute().parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return record


def _check_room(source: Source, folder: Path) -> None:
    needed = sum(file.stat().st_size for file in source.folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free < needed * 1.01:
        raise ConvertError(
            f"{folder} has {free / 1e9:.2f} GB free, and the checkpoint takes "
            f"{needed / 1e9:.2f} GB: choose another folder, or make room"
        )


def _record(
    source: Source, settings: Settings, counts: Counter[str], seconds: float
) -> dict[str, Any]:
    changed, resume_with = _changes(source, settings)
    renamed = {name: change.name for name, change in settings.states.items()}
    said = [
        f"{counts[name]:,} elements of {name} were converted to {new}"
        for name, new in renamed.items()
        if new != name
    ]
    said += [
        f"{name} {'was rescaled' if counts[name] else 'was copied'}"
        for name, new in renamed.items()
        if new == name
    ]
    say_here(f"{'; '.join(said)}; {counts['copied']:,} other archives were copied")
    if counts["nonfinite"]:
        say_here(
            f"{counts['nonfinite']:,} elements of the state are NaN or infinite, in the input as "
            "in the output"
        )
    for name, (old, now) in changed.items():
        say_here(f"{name}: {old} -> {now}")
    size = counts["bytes"]
    say_here(f"wrote and verified {size / 1e9:.3f} GB in {seconds:.1f} s")
    return {
        "checkpoint": str(source.folder.absolute()),
        "iteration": iteration_of(source.folder),
        "to": settings.to,
        "step": settings.step,
        "rule": settings.rule,
        "lr_factor": settings.lr_factor,
        "changed": changed,
        "elements": sum(counts[name] for name, new in renamed.items() if new != name),
        "nonfinite": counts["nonfinite"],
        "bytes": size,
        "seconds": seconds,
        "flags": resume_with,
        "megatron_s3": __version__,
    }


def _changes(source: Source, settings: Settings) -> tuple[dict[str, tuple[Any, Any]], str]:
    """Returns the settings that changed, and what to resume with: flags, or a configuration."""
    objects = [*source.parsed.values()]
    new = [groups.convert(found, settings) for found in objects]
    before, after = (
        next((args for each in held for args in groups.arguments(each)), None)
        for held in (objects, new)
    )
    description = settings.description
    own = {
        h: settings.hyperparameters[h.name]
        for h in _numbers(description)
        if not settings.back and settings.hyperparameters[h.name] != h.default
    }
    beta1, beta2 = settings.betas
    if before is not None and after is not None:
        names = ("optimizer", "lr", "min_lr", "weight_decay", "clip_grad")
        others = rates.others(vars(before))
        changed = {n: (getattr(before, n), getattr(after, n)) for n in (*names, *others)}
        flags = [f"--optimizer {after.optimizer} --lr {after.lr} --min-lr {after.min_lr}"]
        flags.append(f"--weight-decay {after.weight_decay} --clip-grad {after.clip_grad:g}")
        flags += [f"--{name.replace('_', '-')} {getattr(after, name)}" for name in others]
        if settings.back:  # those by which the state was converted
            flags.append(f"--adam-beta1 {beta1:g} --adam-beta2 {beta2:g}")
        flags += [f"{flag(description, h)} {value:g}" for h, value in own.items()]
        return changed, " ".join(flags)
    one, other = (
        next(group for each in held for group in groups.find(each)) for held in (objects, new)
    )
    changed = {n: (one[n], other[n]) for n in ("max_lr", "min_lr", "weight_decay") if n in other}
    fields = {"optimizer": settings.to, "lr": other.get("max_lr"), "min_lr": other.get("min_lr")}
    fields |= {"weight_decay": other.get("weight_decay"), "clip_grad": settings.clip_grad}
    if settings.back:
        fields |= {"adam_beta1": beta1, "adam_beta2": beta2}
    fields |= {destination(description, h): value for h, value in own.items()}
    return changed, f"OptimizerConfig({', '.join(f'{k}={v!r}' for k, v in fields.items())})"


def _numbers(description: Description) -> list[Hyperparameter]:
    """Returns the hyperparameters whose default is a number; these have a flag here."""
    return [h for h in description.hyperparameters if type(h.default) is float]


def main(argv: list[str]) -> int:
    """Runs the command.

    Returns:
        0; 2 after one line on stderr if the input is unusable, 1 if the output differs from what
        was to be written, 130 or 143 if it was interrupted.  The output folder exists only after 0.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-s3 convert",
        allow_abbrev=False,
        description="Convert a checkpoint of AdamW's to one that S3 resumes from, or back. Weights "
        "and main parameters are copied byte for byte. The index of the checkpoint is unpickled: "
        "convert only checkpoints that you trust.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="INPUT",
        help="folder of --save, or of one iteration in it, or of dist_checkpointing.save; format "
        "torch_dist, any layout",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to make, for --load")
    known = transfer.convertible()
    parser.add_argument(
        "--to", choices=(*known, ADAM), required=True, help="optimizer that is to resume"
    )
    parser.add_argument(
        "--iteration",
        type=int,
        metavar="N",
        help="iteration to convert (default: the last one saved)",
    )
    factors = "; ".join(
        f"{own.lr_factor:g} to {name}, and {own.lr_factor_back:g} back"
        for name, own in ((name, each.from_adam) for name, each in known.items())
        if own
    )
    parser.add_argument(
        "--lr-factor",
        type=float,
        metavar="X",
        help="ratio of the other optimizer's learning rate to AdamW's, in both directions; "
        f"lr * weight_decay stays the same (default: {factors}). The default from AdamW suits a "
        "run in progress; the one back to AdamW is the ratio between complete runs. Give the same "
        "factor both ways to restore the first learning rate",
    )
    for description in known.values():
        for h in _numbers(description):
            parser.add_argument(
                flag(description, h),
                type=float,
                metavar="X",
                help=f"{h.help} (default: {h.default:g})",
            )
    args = parser.parse_args(argv)
    hyperparameters: dict[str, Any] = {}
    for description in known.values():
        flags = {flag(description, h): h for h in _numbers(description)}
        given = {h.name: getattr(args, destination(description, h)) for h in flags.values()}
        given = {name: value for name, value in given.items() if value is not None}
        if given and args.to != description.name:
            parser.error(
                f"{' and '.join(flags)} require --to {description.name}: a checkpoint of "
                f"{description.name}'s holds its own values"
            )
        hyperparameters |= given
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
            hyperparameters=hyperparameters,
        )
    except (ConvertError, read.CheckpointError, OSError, Mismatch) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Mismatch) else 2
    except KeyboardInterrupt:
        return 130
    with_load = "" if record["iteration"] is None else f"--load {shlex.quote(args.output)} "
    print(f"wrote {args.output}; resume with {with_load}{record['flags']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
