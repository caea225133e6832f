"""Text to Megatron's indexed datasets: `python -m megatron_s3.data --help`."""

from megatron_s3.data.corpus import EOD, VOCAB_SIZE, build, load, megatron_arguments
from megatron_s3.data.documents import DataError, Source, source

__all__ = [
    "EOD",
    "VOCAB_SIZE",
    "DataError",
    "Source",
    "build",
    "load",
    "megatron_arguments",
    "source",
]
