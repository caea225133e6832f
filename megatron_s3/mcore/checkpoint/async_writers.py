"""Handles a failed write of a checkpoint, and the death of the process that writes it.

In Megatron, with any optimizer, a failed write can kill the process that writes asynchronous
checkpoints, and once that process is dead, the next save waits for it forever.
"""

import time
import traceback
from collections.abc import Callable
from typing import Any

from megatron_s3.errors import MegatronS3Error

__all__ = [
    "WriterDied",
    "clear_frames",
    "is_current_async_call_done",
    "schedule_async_call",
    "write_preloaded_data",
]


class WriterDied(MegatronS3Error, RuntimeError):
    """Raised if the process that writes asynchronous checkpoints has ended."""


def write_preloaded_data(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps the writing of one file; a failed write keeps no reference to the data.

    Returns:
        The result of Megatron's function: the number of the file and its results or the exception.
    """
    output = original(*args, **kwargs)
    if output is not None and isinstance(output[1], BaseException):
        clear_frames(output[1])
    return output


def clear_frames(error: BaseException) -> None:
    """Clears the local variables in an exception's traceback, and in those of its causes.

    One of them is a view of an ``io.BytesIO``. If the garbage collector frees both in one cycle,
    CPython reads freed memory, and the process dies of SIGSEGV (seen in 3.12.1).
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        traceback.clear_frames(found.__traceback__)
        # torch's CheckpointException: by rank, the exception and a summary of its traceback.
        failures = getattr(found, "failures", None) or {}
        left += [found.__cause__, found.__context__, *(failure[0] for failure in failures.values())]


def schedule_async_call(original: Callable[..., Any], caller: Any, async_req: Any) -> Any:
    """Wraps the start of an asynchronous save; its writer must be alive.

    Raises:
        WriterDied: it is not.
    """
    if caller.process is not None and caller.process.exitcode is not None:
        raise _died(caller.process.exitcode)
    return original(caller, async_req)


def is_current_async_call_done(
    original: Callable[..., Any], caller: Any, blocking: bool = False, no_dist: bool = False
) -> Any:
    """Wraps the check whether an asynchronous save has ended; a dead writer is an error.

    Raises:
        WriterDied: the writer ended before it had written everything.
    """
    while caller.process is not None and caller.cur_item is None:
        status = caller.process.exitcode  # checked first: a writer answers before it ends
        if not caller._persistent_comp_q.empty():
            break
        if status is not None:
            raise _died(status)
        if not blocking:
            break
        time.sleep(0.1)
    return original(caller, blocking, no_dist)


def _died(status: int) -> WriterDied:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return WriterDied(
        f"the process that writes asynchronous checkpoints {how}, so the last checkpoint is "
        "incomplete. The kernel sends signal 9 when the host's memory runs out: an asynchronous "
        "save holds a copy of the rank's state. Start the run again; it resumes from the newest "
        "complete checkpoint."
    )
