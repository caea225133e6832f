"""Folders for results, looked at before the work for them begins."""

import contextlib
import tempfile
from pathlib import Path

__all__ = ["refuse_unwritable"]


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
