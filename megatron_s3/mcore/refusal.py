"""Arguments that a training is refused with: one line instead of every rank's traceback."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from megatron_s3.errors import MegatronS3Error

__all__ = ["Refused", "in_one_line"]


#: Seconds that other ranks leave rank 0, which may be slower, to say why.
_PATIENCE = 60.0


class Refused(MegatronS3Error, ValueError):
    """The plugin does not train with these arguments; says which, why, and what to do."""


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Ends the process with status 2 where arguments are refused, after a line of rank 0's.

    Every rank has the same arguments, and refuses them alike. The first rank that ends has the
    others killed, so that it must not be one that is silent.
    """
    try:
        yield
    except Refused as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(_PATIENCE)
        sys.exit(2)
