"""Test whether a folder takes files: before the work for them begins, and after one failed."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["refuse_unwritable", "why_not"]


def refuse_unwritable(folder: Path, name: str) -> None:
    """Makes sure that files can be written into a folder, which is left as it was.

    Args:
        folder: where the results will be; it need not be there.
        name: of the flag or argument that named it, for the message.

    Raises:
        OSError: they cannot be; the message is one line.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(0, "it is a file, and has to be a folder")
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
    """Returns why a folder takes no file, or None if it does.

    The disk is asked, because what Megatron and torch hand on from the writers says
    "AssertionError" or "unexpected pos".
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
