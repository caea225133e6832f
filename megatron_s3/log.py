"""The package's output: lines of the logger ``megatron_s3.output``, which begin with its name.

A program can configure this logger (its level, its handlers) to suppress or redirect the lines.
"""

import contextlib
import functools
import logging
import os
import sys

__all__ = ["say", "say_here", "say_once", "tell", "tell_once"]


class _Output(logging.Handler):
    """A handler that writes to the present standard output, or to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line; if the output's disk is full, the line is lost and no error is raised."""
        stream = sys.stderr if record.levelno < logging.INFO else sys.stdout
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            print(self.format(record), file=stream, flush=True)


_logger = logging.getLogger("megatron_s3.output")
if not _logger.handlers:
    _handler = _Output()
    _handler.setFormatter(logging.Formatter("[megatron_s3] %(message)s"))
    _logger.addHandler(_handler)
    _logger.setLevel(logging.DEBUG)
    _logger.propagate = False  # handlers of the program would write each line again


def say(message: str) -> None:
    """Writes a line to standard output on the first rank.

    If several nodes have a launcher each, the launcher of the first node writes it.
    """
    if _speaks():
        say_here(message)


def say_here(message: str) -> None:
    """Writes a line to standard output on any rank."""
    _logger.info("%s", message)


def tell(message: str) -> None:
    """Writes a line about progress or an oddity to standard error, on the first rank."""
    if _speaks():
        _logger.debug("%s", message)


def _speaks() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_NODEID", "0")) == "0"


#: Variants that write a line once, however often they are called.
say_once = functools.cache(say)
tell_once = functools.cache(tell)
