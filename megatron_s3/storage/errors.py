"""Errors about files."""

from megatron_s3.errors import MegatronS3Error

__all__ = ["Damaged", "unreadable"]


class Damaged(MegatronS3Error, ValueError):
    """Raised for a damaged checkpoint; the message begins with the file's path."""


def unreadable(path: object, error: Exception) -> Damaged:
    """Returns the error for a file whose content cannot be read."""
    return Damaged(f"{path} cannot be read ({type(error).__name__}: {error})")
