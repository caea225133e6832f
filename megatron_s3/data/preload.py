"""Imports that all workers need; the process from which they are forked makes them once."""

from contextlib import suppress

from megatron_s3.data import indexed

with suppress(Exception):  # the worker that needs it reports the error
    indexed.library()
    import tokenizers  # noqa: F401
