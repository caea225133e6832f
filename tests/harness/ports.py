"""A port for the rendezvous of ranks on this machine."""

import os
import random
import socket

__all__ = ["free_port"]

#: Below what Linux gives to outgoing connections (from 32768 on): between our looking and rank 0's
#: listening, one of another run's could take the port.
_FIRST, _LAST = 20_000, 32_000


def free_port() -> int:
    """One that nothing listens on at 127.0.0.1 now.

    Raises:
        OSError: a hundred of them were taken.
    """
    # Not random's own state, which is alike in all forks of a process.
    rng = random.Random(os.urandom(8))
    for _ in range(100):
        port = rng.randrange(_FIRST, _LAST)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port found between {_FIRST} and {_LAST}")
