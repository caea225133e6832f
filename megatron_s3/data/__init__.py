"""Conversion of text to Megatron's indexed datasets: `megatron-s3 data --help`."""

from megatron_s3.data.corpus import build, load, megatron_arguments
from megatron_s3.data.documents import Source, source
from megatron_s3.data.errors import DataError, IncompleteError

__all__ = [
    "DataError",
    "IncompleteError",
    "Source",
    "build",
    "load",
    "megatron_arguments",
    "source",
]
