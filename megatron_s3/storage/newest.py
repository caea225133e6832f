"""The newest complete checkpoint of a run.

The trainer loads it, the launcher and the job script compare it with the last iteration of the
training, and ``megatron-s3 convert`` and ``export`` read it.  Neither torch nor Megatron is
imported.
"""

import json
from pathlib import Path
from typing import Final, Literal

from megatron_s3.storage.errors import Damaged
from megatron_s3.storage.layout import CONFIG, INDEX, TRACKER, folder_of, iteration_of

__all__ = ["RELEASE", "Unclear", "absent", "complete", "is_complete", "named", "newest", "saved"]

#: In place of an iteration: released weights, which do not continue a run.
RELEASE: Final = "release"


class Unclear(Damaged):
    """Raised where the newest iteration is unknown; the message does not say what to do."""


def newest(save_dir: Path, *, config: bool = True) -> int | Literal["release"] | None:
    """Returns the newest complete iteration, :data:`RELEASE`, or None where nothing was saved.

    The tracker file names it.  A job that is killed after its first save but before that file is
    written leaves one complete iteration and no tracker file: that iteration is returned.

    Args:
        save_dir: the folder of ``--save``; it need not exist.
        config: as for :func:`is_complete`.

    Raises:
        Unclear: the tracker file is damaged, names an iteration that does not exist, or is missing
            although there are several complete iterations.
        OSError: the tracker file cannot be read.
    """
    tracker = save_dir / TRACKER
    found = named(tracker)
    if found is None:
        there = complete(save_dir, config=config)
        if len(there) > 1:
            raise Unclear(f"{tracker} is missing, and there are complete checkpoints beside it")
        return there[0] if there else None
    if isinstance(found, int) and not folder_of(save_dir, found).is_dir():
        raise Unclear(absent(str(tracker), save_dir, found))
    return found


def absent(source: str, save_dir: Path, iteration: int) -> str:
    """Returns the message about an iteration that is named and does not exist."""
    return f"{source} names iteration {iteration}, and there is no {folder_of(save_dir, iteration)}"


def named(tracker: Path) -> int | Literal["release"] | None:
    """Returns what a tracker file names: an iteration or :data:`RELEASE`; None if it is missing.

    Raises:
        Unclear: it names neither.
        OSError: it cannot be read.
    """
    try:
        text = tracker.read_bytes().decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if text == RELEASE:
        return RELEASE
    if not (text.isascii() and text.isdecimal()):
        raise Unclear(f"{tracker} names {text[:20]!r} instead of an iteration")
    return int(text)


def saved(save_dir: Path) -> list[int]:
    """Returns the iterations that have a folder, complete or not, in ascending order."""
    return sorted(n for n in map(iteration_of, save_dir.glob("iter_*")) if n is not None)


def complete(save_dir: Path, *, config: bool = True) -> list[int]:
    """Returns the complete iterations, in ascending order."""
    return [n for n in saved(save_dir) if is_complete(folder_of(save_dir, n), config=config)]


def is_complete(folder: Path, *, config: bool = True) -> bool:
    """Returns whether a save of this iteration was completed.

    Megatron writes ``metadata.json`` last.  In formats without that file torch writes its index
    last.  In the format ``torch`` nothing marks the end of a save.

    Args:
        folder: the folder of the iteration.
        config: whether ``metadata.json`` has to exist (``layout.has_config``).
    """
    if not config and (folder / INDEX).is_file():
        return True
    try:
        return isinstance(json.loads((folder / CONFIG).read_bytes()), dict)
    except (OSError, ValueError):
        return bool(list(folder.glob("mp_rank_*/*.pt")))
