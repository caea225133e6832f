"""The newest complete checkpoint of a run: the one answer, for whoever asks.

The trainer loads it, the launcher and the job's body compare it with where training ends, and
``megatron-s3 convert`` and ``export`` read it. Neither torch nor Megatron is imported.
"""

import json
from pathlib import Path
from typing import Final, Literal

from megatron_s3.storage.errors import Damaged
from megatron_s3.storage.layout import CONFIG, INDEX, TRACKER, folder_of, iteration_of

__all__ = ["RELEASE", "Unclear", "absent", "complete", "is_complete", "named", "newest", "saved"]

#: In place of an iteration: weights that were released, and continue no run.
RELEASE: Final = "release"


class Unclear(Damaged):
    """Nothing tells which iteration is the newest; the message does not say what to do."""


def newest(save_dir: Path, *, config: bool = True) -> int | Literal["release"] | None:
    """Returns the newest complete iteration, :data:`RELEASE`, or None where nothing was saved.

    It is what the tracker file names. A job that was killed between the end of its first save and
    that file leaves one complete iteration and none that is named: then it is that one.

    Args:
        save_dir: what ``--save`` named; it need not be there.
        config: as for :func:`is_complete`.

    Raises:
        Unclear: the tracker file is damaged, names what is not there, or is missing beside several
            complete iterations.
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
    """Returns the message about an iteration that something names and that is not there."""
    return f"{source} names iteration {iteration}, and there is no {folder_of(save_dir, iteration)}"


def named(tracker: Path) -> int | Literal["release"] | None:
    """Returns what a tracker file names, an iteration or :data:`RELEASE`; None if it is missing.

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
        raise Unclear(f"{tracker} names no iteration, but {text[:20]!r}")
    return int(text)


def saved(save_dir: Path) -> list[int]:
    """Returns the iterations that have a folder, complete or not, in order."""
    return sorted(n for n in map(iteration_of, save_dir.glob("iter_*")) if n is not None)


def complete(save_dir: Path, *, config: bool = True) -> list[int]:
    """Returns the iterations of which a save has ended, in order."""
    return [n for n in saved(save_dir) if is_complete(folder_of(save_dir, n), config=config)]


def is_complete(folder: Path, *, config: bool = True) -> bool:
    """Returns whether a save of this iteration has ended.

    Megatron writes ``metadata.json`` after all else. In formats that have none torch writes its
    index after all else; in the format ``torch`` nothing tells.

    Args:
        folder: of the iteration.
        config: whether ``metadata.json`` has to be there (``layout.has_config``).
    """
    if not config and (folder / INDEX).is_file():
        return True
    try:
        return isinstance(json.loads((folder / CONFIG).read_bytes()), dict)
    except (OSError, ValueError):
        return bool(list(folder.glob("mp_rank_*/*.pt")))
