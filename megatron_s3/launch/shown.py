"""A launch in its own process, with progress on standard output and its output in a log."""

import functools
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from megatron_s3.launch import lock

__all__ = ["launch", "tail"]

_LINE_EVERY_S = 10.0
_TAIL_LINES = 25

_ITERATION = re.compile(
    r"iteration +(\d+)/ *(\d+) \|.*elapsed time per iteration \(ms\): ([\d.]+)"
    r"(?:.*\blm loss: (\S+))?"
)
_RANK_FAILED = re.compile(r"failed \(exitcode: ")


def launch(words: list[str], log: Path, tokens: int) -> int:
    """Runs ``megatron-s3 launch``.

    Args:
        words: its arguments.
        log: file to which its output is appended.
        tokens: number of tokens in an iteration.

    Returns:
        Its exit status.
    """
    command = [sys.executable, "-m", "megatron_s3.cli", "launch", *words]
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    progress = _Progress(tokens)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            preexec_fn=functools.partial(lock.die_with_parent, os.getpid()),
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                progress.read(line)
            return process.wait()
        finally:
            progress.close()
            if process.poll() is None:
                process.terminate()
                file.writelines(process.stdout)  # a rank that waits for a reader saves nothing
                process.wait()


def tail(log: Path) -> list[str]:
    """Returns the end of a launch's output, before torchrun's report of the failed rank."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("$ "))
    end = next((i for i in range(start, len(lines)) if _RANK_FAILED.search(lines[i])), None)
    return lines[start:end][-_TAIL_LINES:]


class _Progress:
    """Progress: one line that is rewritten on a terminal, or a line every few seconds."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._rewrite = sys.stdout.isatty()
        self._shown_at = float("-inf")
        self._pending = ""
        if self._rewrite:
            self._show("  starting Megatron ...")

    def read(self, line: str) -> None:
        """Reads a line of Megatron's output."""
        found = _ITERATION.search(line)
        if not found or not found[4]:
            return
        iteration, last = int(found[1]), int(found[2])
        seconds = float(found[3]) / 1000
        left = int((last - iteration) * seconds)
        self._show(
            f"  iteration {iteration}/{last}  loss {float(found[4]):.3f}  "
            f"{self._tokens / seconds:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
        )

    def close(self) -> None:
        """Ends the progress, and keeps its last line."""
        if self._rewrite:
            print()
        elif self._pending:
            print(self._pending, flush=True)

    def _show(self, text: str) -> None:
        if self._rewrite:
            print(f"\r\033[K{text}", end="", flush=True)
        elif time.monotonic() - self._shown_at >= _LINE_EVERY_S:
            self._shown_at = time.monotonic()
            self._pending = ""
            print(text, flush=True)
        else:
            self._pending = text
