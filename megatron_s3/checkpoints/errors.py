"""Errors of conversion and export."""

from megatron_s3.errors import MegatronS3Error

__all__ = ["ConvertError", "Mismatch", "TransferError"]


class ConvertError(MegatronS3Error, ValueError):
    """The conversion cannot be made; the message names the file, the reason and what to do."""


class TransferError(MegatronS3Error, ValueError):
    """The state or the arguments cannot be handed over; the message says why, and what to do."""


class Mismatch(MegatronS3Error, RuntimeError):
    """Raised where what was written is not, or does not compute, what it should."""
