"""Files that the user alone can read: records of a run name machines, paths and settings."""

import os
from pathlib import Path

__all__ = ["append", "write"]


def write(path: Path, text: str) -> None:
    """Writes a file as a whole, mode 0600: a full disk leaves the old one as it was.

    Args:
        path: the file.
        text: is written in UTF-8; what Python has read as undecodable bytes becomes these again.

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
    """Adds to the end of a file, and makes its mode 0600.

    Raises:
        OSError: it cannot be written.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open(file, "w", encoding="utf-8", errors="surrogateescape") as stream:
        os.fchmod(file, 0o600)
        stream.write(text)
