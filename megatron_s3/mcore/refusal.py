"""Errors that all ranks have alike: one line instead of a traceback from every rank."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from megatron_s3.errors import MegatronS3Error

__all__ = ["AllRanksError", "Refused", "in_one_line"]


#: Seconds that other ranks wait for the one that prints the reason, which may be slower.
_PATIENCE = 60.0


class Refused(MegatronS3Error, ValueError):
    """Raised if the plugin cannot train with the arguments; says which, why and what to do."""


class AllRanksError(MegatronS3Error, ValueError):
    """Raised on all ranks of a group if one of them found an error, such as a damaged checkpoint.

    Attributes:
        speaker: the rank that prints the message for all of them.
    """

    def __init__(self, message: str, speaker: int = 0) -> None:
        super().__init__(message)
        self.speaker = speaker


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Ends the process with one line from one rank after an error that all ranks have alike.

    The status is 2 if arguments are rejected, and 1 otherwise. When the first rank ends, the others
    are killed, so a silent rank must not be the first. A rank that nobody kills prints the line
    too: the one that prints for all has no such error, because its node differs.
    """
    try:
        yield
    except (Refused, AllRanksError) as error:
        if os.environ.get("RANK", "0") != str(getattr(error, "speaker", 0)):
            time.sleep(_PATIENCE)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, Refused) else 1)
