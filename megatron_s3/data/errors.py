"""Errors of the conversion of text to a dataset."""

from megatron_s3.errors import MegatronS3Error


class DataError(MegatronS3Error, ValueError):
    """An input that cannot be converted to a dataset; the message says what to do instead."""


class IncompleteError(MegatronS3Error, RuntimeError):
    """Work that stopped for a reason other than the input; the same command continues it."""
