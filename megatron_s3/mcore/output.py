"""What the plugin says, and what Megatron does not."""

import contextlib
import functools
import io
import logging
import os
import warnings
from collections.abc import Iterator

__all__ = ["quiet", "say", "say_once"]


def say(message: str) -> None:
    """Prints one line, on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"[megatron_s3] {message}", flush=True)


#: For what Megatron asks more than once, or of every part of an optimizer.
say_once = functools.cache(say)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Megatron's table of arguments and its warnings about optional packages."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
