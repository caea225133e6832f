"""The base of the package's errors."""

__all__ = ["MegatronS3Error"]


class MegatronS3Error(Exception):
    """Something that the user has to know: the message says what, where, why and what to do.

    The errors that derive from it derive from Python's own kind (ValueError, RuntimeError) too.
    """
