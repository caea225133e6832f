"""Choice of the iteration to read, made once for everything that Megatron reads."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_s3.log import say_once
from megatron_s3.mcore.all_ranks import raise_first
from megatron_s3.storage.layout import TRACKER, folder_of, has_config
from megatron_s3.storage.newest import Unclear, absent, complete, named, newest

__all__ = ["Choice", "choose", "chosen", "complete_ones", "instead"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The iteration to read.

    Attributes:
        folder: its folder; None if only Megatron's own checks apply (``--non-persistent-ckpt-type
            local``, object stores).
        iteration: its number; None for a release.
        persistent: whether it is in the folder of ``--load``.
    """

    folder: Path | None
    iteration: int | None
    persistent: bool = True


@contextlib.contextmanager
def chosen(load_dir: str | None, args: Any, context: Any) -> Iterator[Choice | None]:
    """Makes Megatron read the iteration that is yielded, or report that it starts without one.

    Nested uses read the same iteration.
    """
    if load_dir is None or "://" in str(load_dir):
        yield None
        return
    choice, error = None, None
    kind = getattr(args, "non_persistent_ckpt_type", None)
    try:
        # First, because its ranks communicate.
        local = _local_iteration(context) if kind == "local" else -1
        choice = choose(Path(load_dir), args, local)
    except Unclear as caught:
        error = f"{caught}. {instead(Path(load_dir), args)}"
    except OSError as caught:
        error = str(caught)
    raise_first(error)
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
    """Returns the newest iteration of ``--non-persistent-ckpt-type local``; -1 if none."""
    manager = (context or {}).get("local_checkpoint_manager")
    return -1 if manager is None else manager.find_latest()


def choose(load_dir: Path, args: Any, local: int = -1) -> Choice | None:
    """Returns the iteration to read, chosen as Megatron does; --ckpt-step has priority.

    Args:
        load_dir: the folder of ``--load``.
        args: Megatron's arguments.
        local: the newest iteration of ``--non-persistent-ckpt-type local``, or -1.

    Raises:
        Unclear: a tracker file is damaged, or the iteration that it names does not exist.
    """
    step = getattr(args, "ckpt_step", None)
    elsewhere = Path(
        getattr(args, "non_persistent_global_ckpt_dir", None) or load_dir / "non_persistent"
    )
    latest = local
    if getattr(args, "non_persistent_ckpt_type", None) == "global":
        found = named(elsewhere / TRACKER)
        latest = found if isinstance(found, int) else local
    if step and latest != step:
        return _there(load_dir, step, "--ckpt-step")
    if not step:
        persistent = _persistent(load_dir, args)
        if latest == -1 or (persistent is not None and latest < (persistent.iteration or 0)):
            return persistent
    if local != -1:
        return Choice(None, latest, persistent=False)
    newest_there = _there(elsewhere, latest, str(elsewhere / TRACKER))
    return dataclasses.replace(newest_there, persistent=False)


def _persistent(load_dir: Path, args: Any) -> Choice | None:
    found = newest(load_dir, config=has_config(getattr(args, "ckpt_format", None)))
    if found is None:
        return None
    if not isinstance(found, int):  # a release
        return Choice(folder_of(load_dir, None), None)
    tracker = load_dir / TRACKER
    if not tracker.is_file():
        say_once(
            f"loading iteration {found}: {tracker} is missing, and no other iteration is complete"
        )
    elif os.environ.get("RANK", "0") == "0":
        _say_newer(load_dir, found, args)
    return Choice(folder_of(load_dir, found), found)


def _there(load_dir: Path, iteration: int, source: str) -> Choice:
    folder = folder_of(load_dir, iteration)
    if not folder.is_dir():
        raise Unclear(absent(source, load_dir, iteration))
    return Choice(folder, iteration)


def _say_newer(load_dir: Path, found: int, args: Any) -> None:
    """Logs newer iterations, of a job killed before the tracker file or of an edited one."""
    if newer := [str(i) for i in complete_ones(load_dir, args) if i > found]:
        say_once(
            f"loading iteration {found}, which {load_dir / TRACKER} names; newer iterations are "
            f"complete: {', '.join(newer)} (choose one with --ckpt-step)"
        )


def complete_ones(load_dir: Path, args: Any) -> list[int]:
    """Returns the iterations whose save in the arguments' format has ended, in order."""
    return complete(load_dir, config=has_config(getattr(args, "ckpt_format", None)))


def instead(load_dir: Path, args: Any, but: Path | None = None) -> str:
    """Returns the remedy for the end of an error message.

    Args:
        load_dir: the folder of ``--load``.
        args: Megatron's arguments.
        but: the folder of an iteration that cannot be used.
    """
    others = (i for i in complete_ones(load_dir, args) if folder_of(load_dir, i) != but)
    there = ", ".join(map(str, others))
    if not there:
        return "Nothing was loaded, and no other iteration is complete."
    return f"Nothing was loaded. Choose an iteration with --ckpt-step; complete: {there}."
