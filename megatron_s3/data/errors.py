"""Errors on the way from text to a dataset."""

from megatron_s3.errors import MegatronS3Error


class DataError(MegatronS3Error, ValueError):
    """The input cannot be made into a dataset; the message says what to do instead."""


class IncompleteError(MegatronS3Error, RuntimeError):
    """The work stopped through no fault of the input; the same command goes on where it stopped."""
