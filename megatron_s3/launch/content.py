"""Identity of a run's data, so that Megatron's indices of other data are not reused.

Megatron keeps shuffled indices in --data-cache-path. Their names depend on the paths of the
datasets and not on the contents.
"""

import hashlib
import json
from pathlib import Path

from megatron_s3.launch.config import Config

__all__ = ["LISTS", "cache_folder", "changed"]

_PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
#: Megatron's arguments that name a file with a list of datasets.
LISTS = ("data_args_path", "per_split_data_args_path")


def cache_folder(config: Config, run_dir: Path) -> Path:
    """Returns the folder for Megatron's indices; each content of the data has its own."""
    folder = run_dir.absolute() / "data-cache"
    known = _content(config)
    if not known:
        return folder
    return folder / hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def changed(config: Config, run_dir: Path) -> bool:
    """Returns whether the run has indices and all of them belong to other data."""
    folder = cache_folder(config, run_dir)
    if folder.exists() or folder.name == "data-cache":
        return False
    return folder.parent.is_dir() and any(path.is_dir() for path in folder.parent.iterdir())


def _content(config: Config) -> list[object]:
    """Returns values that identify the data: checksums, or else sizes and times."""
    if config.dataset:
        from megatron_s3 import data

        found = data.load(config.dataset) or {}
        return [found.get(side) for side in ("train", "valid")] if found else []
    words: list[str] = []
    for name in (*_PATHS, *LISTS):
        given = config.arguments.get(name)
        given = given if isinstance(given, list) else str(given or "").split()
        words += map(str, given)
    for name in LISTS:
        path = Path(str(config.arguments.get(name) or "/"))
        if path.is_file():
            words += path.read_text(errors="replace").replace('"', " ").replace(",", " ").split()
    files = [Path(word + ending) for word in words for ending in ("", ".idx", ".bin")]
    stats = [(str(path), path.stat()) for path in files if path.is_file()]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
