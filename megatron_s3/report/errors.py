"""Errors of the report."""

from megatron_s3.errors import MegatronS3Error

__all__ = ["RunError"]


class RunError(MegatronS3Error, ValueError):
    """A run that cannot be read; the message names its folder and what is missing."""
