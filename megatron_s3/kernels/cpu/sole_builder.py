"""Lets one process build a file, and has those that want the same one wait for it."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["sole_builder"]

_logger = logging.getLogger(__name__)
_POLL = 0.1  # seconds
_QUIET = 2.0  # seconds that a wait may take unsaid


@contextmanager
def sole_builder(
    path: Path, what: str, done: Callable[[], bool], patience: float
) -> Iterator[None]:
    """Holds the right to build a file; enters at once when another process has built it.

    It is a lock on a file beside it, which the system takes from a process that dies.  On shared
    disks it holds between nodes where the file system's flock does (NFS, Lustre mounted with
    flock); where there is none, or after ``patience``, each process builds for itself.

    Args:
        path: the file that is to be built.
        what: it is, in words for the log.
        done: whether it is there.
        patience: seconds to wait for another process.

    Raises:
        OSError: nothing can be written there.
    """
    lock = path.with_name(path.name + ".lock")
    begin, said = time.monotonic(), False
    while True:
        with lock.open("a+") as file:
            held = _held(file.fileno(), lock)
            if held or held is None:
                try:
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}")
                    file.flush()
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return
            file.seek(0)
            holder = file.read() or "another process"
        waited = time.monotonic() - begin
        if done():
            yield
            return
        if waited > patience:
            _logger.warning("%s: %s has not built it in %.0f s", what, holder, waited)
            yield
            return
        if waited > _QUIET and not said:
            _logger.warning("waiting for %s, which builds %s: %s", holder, what, path)
            said = True
        time.sleep(_POLL)


def _held(file: int, lock: Path) -> bool | None:
    """Returns whether the lock is this process's now; None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    try:  # not one that its holder has removed since it was opened here
        return os.path.samestat(lock.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
