"""A pool of threads for a step's work, kept between steps."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["spread"]

_threads: ThreadPoolExecutor | None = None
_threads_count = 0


def spread(run: Callable[..., None], shares: Sequence[tuple[int, ...]]) -> None:
    """Runs ``run(*share)`` for every share, if possible in as many threads as there are shares.

    The caller's thread takes shares too.  It takes all of them when the interpreter is shutting
    down, where no thread can be started and a pool takes no work.  The function returns when the
    last share is done, even if an error is raised.
    """
    waiting, left = deque(shares), len(shares)
    errors: list[BaseException] = []
    count, finished = threading.Lock(), threading.Event()

    def work() -> None:
        nonlocal left
        while True:
            try:
                share = waiting.popleft()
            except IndexError:
                return
            try:
                run(*share)
            except BaseException as error:  # raised below, by the caller's thread
                errors.append(error)
            with count:
                left -= 1
                if not left:
                    finished.set()

    if len(shares) > 1:
        pool = _pool(len(shares) - 1)
        with contextlib.suppress(RuntimeError):
            for _ in shares[1:]:
                pool.submit(work)
    if shares:
        work()
    while shares and not finished.is_set():
        try:
            finished.wait()
        except KeyboardInterrupt as error:  # other threads still write to the caller's memory
            errors.append(error)
    if errors:
        raise errors[0]


def _pool(count: int) -> ThreadPoolExecutor:
    """Returns a pool of at least ``count`` threads."""
    global _threads, _threads_count
    pool = _threads
    if pool is None or _threads_count < count:
        # The previous pool ends with its last reference.
        pool = ThreadPoolExecutor(count, "megatron-s3-step")
        _threads, _threads_count = pool, count
    return pool


def _forget() -> None:
    global _threads
    _threads = None  # its threads do not exist in a forked process


os.register_at_fork(after_in_child=_forget)
