"""The commit of the code that runs, also where a copy has no git."""

import os
import subprocess
from pathlib import Path

__all__ = ["FILE", "UNKNOWN", "commit", "write"]

#: Names the file that a copy without git carries; by default ``COMMIT`` at the top of the copy.
FILE = "MEGATRON_S3_COMMIT"
UNKNOWN = "unknown"
_CHANGED = "changed"

_ROOT = Path(__file__).resolve().parents[2]


def commit(root: Path = _ROOT) -> dict[str, str | bool | None]:
    """Returns ``commit`` and whether files were ``changed`` since; neither is ever guessed.

    Args:
        root: the top of the repository.

    Returns:
        What git says in a repository, otherwise what :func:`write` wrote into a file.  The commit
        is :data:`UNKNOWN` and ``changed`` None where there is neither.
    """
    if (root / ".git").exists():  # git would take a repository around a copy for its own
        found = _git(root, "rev-parse", "HEAD")
        status = _git(root, "status", "--porcelain", "--untracked-files=no")
        if found and status is not None:
            return {"commit": found, "changed": bool(status)}
    path = Path(os.environ.get(FILE) or root / "COMMIT")
    words = path.read_text(encoding="utf-8").split() if path.is_file() else []
    if not words or words[0] == UNKNOWN:
        return {"commit": UNKNOWN, "changed": None}
    return {"commit": words[0], "changed": words[1:] == [_CHANGED]}


def write(path: Path, root: Path = _ROOT) -> None:
    """Writes a file that tells a copy without git what :func:`commit` returns here."""
    found = commit(root)
    changed = f" {_CHANGED}" if found["changed"] else ""
    path.write_text(f"{found['commit']}{changed}\n", encoding="utf-8")


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", root, *words], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
