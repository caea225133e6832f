"""A lock that lets one process build a file while others wait for it."""

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
_QUIET = 2.0  # seconds of waiting before a line is logged


@contextmanager
def sole_builder(
    path: Path, what: str, done: Callable[[], bool], patience: float
) -> Iterator[None]:
    """Holds the lock for building a file, or returns once another process has built it.

    The lock is a file next to the one to build, and the system releases it when its process dies.
    On shared disks it works between nodes if the file system's flock does (NFS, Lustre mounted with
    flock).  Without locks, or after ``patience``, each process builds for itself.

    Args:
        path: the file to build.
        what: a name of it for the log.
        done: returns whether the file has been built.
        patience: how many seconds to wait for another process.

    Raises:
        OSError: nothing can be written to the folder.
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
            _logger.warning("building %s: %s has not built it in %.0f s", what, holder, waited)
            yield
            return
        if waited > _QUIET and not said:
            _logger.warning("waiting for %s, which builds %s: %s", holder, what, path)
            said = True
        time.sleep(_POLL)


def _held(file: int, lock: Path) -> bool | None:
    """Returns whether this process holds the lock; None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    try:  # its holder may have removed the file since it was opened here
        return os.path.samestat(lock.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
