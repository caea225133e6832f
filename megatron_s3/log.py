"""The package's output: lines of the logger ``megatron_s3.output``, with the package's name.

A program that configures this logger (its level, its handlers) decides what becomes of the lines.
"""

import contextlib
import functools
import logging
import os
import sys

__all__ = ["say", "say_here", "say_once", "tell", "tell_once"]


class _Output(logging.Handler):
    """Writes to what is standard output when a line is written, or beside it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line; a full disk under the output costs the line, and ends nothing."""
        stream = sys.stderr if record.levelno < logging.INFO else sys.stdout
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
            print(self.format(record), file=stream, flush=True)


_logger = logging.getLogger("megatron_s3.output")
if not _logger.handlers:
    _handler = _Output()
    _handler.setFormatter(logging.Formatter("[megatron_s3] %(message)s"))
    _logger.addHandler(_handler)
    _logger.setLevel(logging.DEBUG)
    _logger.propagate = False  # or a program's own handlers would write each line again


def say(message: str) -> None:
    """Writes a line to standard output that all ranks would write: the first one does it.

    Of several nodes' launchers, too, the first one speaks.
    """
    if _speaks():
        say_here(message)


def say_here(message: str) -> None:
    """Writes a line to standard output that is of this process, whichever rank it is."""
    _logger.info("%s", message)


def tell(message: str) -> None:
    """Writes a line beside the output: what is being done that takes time, or what is odd."""
    if _speaks():
        _logger.debug("%s", message)


def _speaks() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_NODEID", "0")) == "0"


#: For what is met more than once.
say_once = functools.cache(say)
tell_once = functools.cache(tell)
