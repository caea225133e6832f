"""Tests whether files can be written to a folder: before work begins, and after a failure."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["refuse_unwritable", "why_not"]


def refuse_unwritable(folder: Path, name: str) -> None:
    """Checks that files can be written to a folder, and leaves it as it was.

    Args:
        folder: the folder for the results; it need not exist.
        name: the flag or argument that names the folder, for the message.

    Raises:
        OSError: no file can be written there; the message is one line.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(0, "it is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{name} {folder}: cannot be written ({error.strerror})") from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def why_not(folder: Path) -> str | None:
    """Returns why no file can be written to a folder, or None if one can.

    It writes a file to find out, because the errors that Megatron and torch pass on from a full
    disk say only "AssertionError" or "unexpected pos".
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        return f"{error.strerror} ({free / 1e6:,.1f} MB free)"
    else:
        return None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
