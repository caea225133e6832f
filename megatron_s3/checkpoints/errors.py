"""Errors of conversion and export."""

from megatron_s3.errors import MegatronS3Error

__all__ = ["ConvertError", "Mismatch"]


class ConvertError(MegatronS3Error, ValueError):
    """Raised where a checkpoint cannot be converted; the message names file, reason and remedy."""


class Mismatch(MegatronS3Error, RuntimeError):
    """Raised where the output differs from, or computes other results than, what was intended."""
