"""What the launcher says, and its small files: neither may end a training."""

import contextlib
import os
from pathlib import Path

__all__ = ["first_node", "replace", "say"]


def first_node() -> bool:
    """Whether this node is the one that speaks for all nodes of a job."""
    return os.environ.get("SLURM_NODEID", "0") == "0"


def say(message: str) -> None:
    """Prints one line, on the first node alone; a full disk under the log costs the line."""
    if first_node():
        with contextlib.suppress(OSError):
            print(f"[megatron-s3] {message}", flush=True)


def replace(path: Path, text: str, mode: int = 0o600) -> None:
    """Writes a file whole, or leaves it as it was.

    Args:
        path: of the file.
        text: all of it.
        mode: its permissions, whatever the umask is.

    Raises:
        OSError: it could not be written.
    """
    part = path.with_name(f".{path.name}.part.{os.getpid()}")
    try:
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(file, "w", encoding="utf-8") as out:
            os.fchmod(file, mode)
            out.write(text)
            out.flush()
            os.fsync(file)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
