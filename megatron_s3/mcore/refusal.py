"""Arguments that a training is refused with: one line instead of every rank's traceback."""

import contextlib
import os
import sys
from collections.abc import Iterator

__all__ = ["Refused", "in_one_line"]


class Refused(ValueError):
    """The plugin does not train with these arguments; says which, why, and what to do."""


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Ends the process with status 2 where arguments are refused, after a line of rank 0's.

    Every rank has the same arguments, and refuses them alike.
    """
    try:
        yield
    except Refused as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
