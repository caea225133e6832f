"""The base class of the package's errors."""

__all__ = ["MegatronS3Error"]


class MegatronS3Error(Exception):
    """An error for the user: the message says what is wrong, where, why and what to do.

    Its subclasses also derive from the fitting class of Python (ValueError, RuntimeError).
    """
