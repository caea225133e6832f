"""The tests of the kernel that need or like a GPU, by pytest."""

import re
import subprocess
import sys
from pathlib import Path

from scripts.acceptance.environment import installed
from scripts.acceptance.rows import Writer
from scripts.acceptance.task import Task

__all__ = ["check"]

_ROOT = Path(__file__).resolve().parents[2]


def check(writer: Writer, task: Task) -> None:
    """One row for each file."""
    for file in ("tests/kernels/test_gpu.py", "tests/gpu"):
        if not (_ROOT / file).exists():
            writer.skipped(file, "not here: it takes a checkout of the repository")
            continue
        if lacking := [name for name in ("pytest", "hypothesis") if not installed(name)]:
            writer.skipped(file, f"not installed: {', '.join(lacking)}")
            continue
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        (task.folder / (file.replace("/", "-") + ".txt")).write_text(done.stdout)
        lines = done.stdout.strip().splitlines()
        last = lines[-1].strip("= ") if lines else "it printed nothing"
        if done.returncode == 0 and not re.search(r"\d+ passed", last):
            writer.skipped(file, last)
        elif done.returncode == 0:
            writer.passed(file, last)
        else:
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
            writer.failed(file, f"{last}; {', '.join(failed[:3])}")
