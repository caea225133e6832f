"""Layout of a run's checkpoints: a folder for each iteration, and a file that names the newest.

The format ``torch`` has no index; it has a folder for each model-parallel rank.
"""

from pathlib import Path

__all__ = [
    "CONFIG",
    "INDEX",
    "SEAL",
    "TRACKER",
    "folder_of",
    "has_config",
    "is_of_format_torch",
    "iteration_of",
]

#: Names the newest complete iteration; Megatron writes it last of all.
TRACKER = "latest_checkpointed_iteration.txt"
#: Torch's index of an iteration; a pickle.
INDEX = ".metadata"
#: Names the format; Megatron writes it last in an iteration's folder.
CONFIG = "metadata.json"
#: Holds the checksums of the index and of the file of the format; ``sha256sum -c`` reads it.
SEAL = "checksums.sha256"


def has_config(ckpt_format: object) -> bool:
    """Returns whether iterations of a ``--ckpt-format`` have the file :data:`CONFIG`."""
    return ckpt_format not in ("torch_dcp", "fsdp_dtensor")


def folder_of(save_dir: Path, iteration: int | None) -> Path:
    """Returns the folder of an iteration, or of a release (None)."""
    return save_dir / ("release" if iteration is None else f"iter_{iteration:07d}")


def iteration_of(folder: Path) -> int | None:
    """Returns the iteration of a folder, or None if it is not the folder of an iteration."""
    head, _, number = folder.name.partition("iter_")
    return int(number) if not head and number.isascii() and number.isdecimal() else None


def is_of_format_torch(folder: Path) -> bool:
    """Returns whether an iteration is in the format ``torch``, a folder for each rank."""
    return bool(list(folder.glob("mp_rank_*")))
