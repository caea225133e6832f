"""What the launcher says."""

import contextlib
import functools
import os
import sys

__all__ = ["first_node", "note", "say"]


def first_node() -> bool:
    """Returns whether this node is the one that speaks for all nodes of a job."""
    return os.environ.get("SLURM_NODEID", "0") == "0"


def say(message: str) -> None:
    """Prints one line, on the first node alone; a full disk under the log costs the line."""
    if first_node():
        with contextlib.suppress(OSError):
            print(f"[megatron-s3] {message}", flush=True)


@functools.cache
def note(message: str) -> None:
    """Prints one line beside the output, once, however often a configuration is read."""
    if first_node():
        with contextlib.suppress(OSError):
            print(f"[megatron-s3] {message}", file=sys.stderr, flush=True)
