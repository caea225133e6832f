"""Errors about arguments: one line instead of a traceback from every rank."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from megatron_s3.errors import MegatronS3Error

__all__ = ["Refused", "in_one_line"]


#: Seconds that other ranks wait for rank 0, which may be slower, to print the reason.
_PATIENCE = 60.0


class Refused(MegatronS3Error, ValueError):
    """Raised if the plugin cannot train with the arguments; says which, why and what to do."""


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Ends the process with status 2 if arguments are rejected, after a line from rank 0.

    All ranks have the same arguments and reject them alike. When the first rank ends, the others
    are killed, so a silent rank must not be the first.
    """
    try:
        yield
    except Refused as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(_PATIENCE)
        sys.exit(2)
