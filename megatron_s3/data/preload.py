"""Imported once by the process from which the workers are forked: they all need it."""

from contextlib import suppress

from megatron_s3.data import indexed

with suppress(Exception):  # told by the worker that needs it
    indexed.library()
    import tokenizers  # noqa: F401
