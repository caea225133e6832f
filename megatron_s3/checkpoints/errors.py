"""Errors of conversion and export."""

from megatron_s3.errors import MegatronS3Error

__all__ = ["ConvertError", "Mismatch", "TransferError"]


class ConvertError(MegatronS3Error, ValueError):
    """Raised where a checkpoint cannot be converted; the message names file, reason and remedy."""


class TransferError(MegatronS3Error, ValueError):
    """Raised where a state cannot be converted; the message says why and what to do."""


class Mismatch(MegatronS3Error, RuntimeError):
    """Raised where the output differs from, or computes other results than, what was intended."""
