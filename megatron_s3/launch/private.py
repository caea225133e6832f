"""Files that only the user can read, because records of a run name machines, paths and settings."""

import os
from pathlib import Path

__all__ = ["append", "write"]


def write(path: Path, text: str) -> None:
    """Writes a file atomically with mode 0600; if the disk is full, the old file stays.

    Args:
        path: path of the file.
        text: the content, written in UTF-8; bytes that Python could not decode are restored.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(file, "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append(path: Path, text: str) -> None:
    """Appends to a file, and sets its mode to 0600.

    Raises:
        OSError: it cannot be written.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open(file, "w", encoding="utf-8", errors="surrogateescape") as stream:
        os.fchmod(file, 0o600)
        stream.write(text)
