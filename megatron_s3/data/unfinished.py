"""The finished parts of a dataset that is not complete yet."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_s3.data import dataset_parts
from megatron_s3.data.errors import DataError
from megatron_s3.data.shards import Shard

__all__ = ["locked", "numbers", "plan", "resume"]


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Locks the folder for this process; a kill releases the lock."""
    path = os.path.join(folder, "lock")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # False if the process that held the lock has removed the file since it was opened here.
            held = os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno()))
        except BlockingIOError:
            held = False
        except OSError as error:  # the file system has no locks
            raise DataError(
                f"{folder}: cannot be locked ({error.strerror}); give an --output-prefix on a file "
                "system with flock"
            ) from error
        if not held:
            raise DataError(f"{folder}: another process is writing this dataset; wait for it")
        yield


def numbers(folder: str) -> list[int]:
    """Returns the numbers of the parts that exist."""
    return sorted(int(n) for n in os.listdir(folder) if n.isdecimal())


def plan(folder: str) -> dict[str, Any]:
    """Returns the settings with which the parts were made."""
    try:
        found: dict[str, Any] = json.loads(Path(folder, "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def resume(prefix: str, shards: list[Shard], settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Returns the finished parts, and removes the files of unfinished ones."""
    folder = Path(f"{prefix}.parts")
    there = numbers(str(folder))
    if there:
        old = plan(str(folder))
        # The input is compared part by part: a file may be repaired before its part is made.
        differing = [
            f"{key} was {json.dumps(old.get(key))}, is {json.dumps(settings[key])}"
            for key in settings
            if key != "input" and old.get(key) != settings[key]
        ]
        finished = {n: part for n in there if (part := dataset_parts.finished(str(folder), n))}
        for number, part in finished.items():
            if number >= len(shards):
                differing.append("the input has become smaller")
            elif part["shard"] != dataset_parts.identity(shards[number]):
                differing.append(f"{shards[number].files[0]} has changed, or a file before it")
            else:
                continue
            break
        if differing:
            raise DataError(
                f"--output-prefix {prefix}: {folder} holds {len(there)} finished parts of another "
                f"run ({'; '.join(differing)}); repeat that run's command to continue it, or "
                "remove the folder to start again"
            )
    else:
        finished = {}
    path = folder / "plan.json"
    new = folder / "plan.json.new"  # a kill must not leave an incomplete plan
    new.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    new.replace(path)
    for left in folder.glob("*.tmp.*"):
        shutil.rmtree(left, ignore_errors=True)
    return finished
