"""The base class of the package's errors, and what they say of a path."""

from pathlib import Path

__all__ = ["MegatronS3Error", "no_file", "no_folder"]


class MegatronS3Error(Exception):
    """An error for the user: the message says what is wrong, where, why and what to do.

    Its subclasses also derive from the fitting class of Python (ValueError, RuntimeError).
    """


def no_folder(path: str | Path) -> str:
    """Returns why a path, which is not a folder, is none."""
    return "it is a file, not a folder" if Path(path).exists() else "no such folder"


def no_file(error: OSError | UnicodeDecodeError) -> str:
    """Returns why a path cannot be read as a text file, from what reading it raised."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not text in UTF-8 (byte {error.start})"
    if isinstance(error, IsADirectoryError):
        return "it is a folder, not a file"
    return "no such file" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
