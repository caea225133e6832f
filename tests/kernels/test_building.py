"""One process builds, the others wait; the right to build ends with its holder."""

import fcntl
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_s3.kernels.cpu.sole_builder import sole_builder


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    """Exact: its file is still there, its lock is not."""
    path = tmp_path / "kernel.so"
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); "
        "fcntl.flock(file, fcntl.LOCK_EX); file.write('process 1 on node7'); file.flush(); "
        "print('held', flush=True); input()"
    )
    lock = f"{path}.lock"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, lock], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert os.path.exists(lock)
    with sole_builder(path, "it", path.exists, patience=0):
        assert Path(lock).read_text() == f"process {os.getpid()} on {os.uname().nodename}"
        path.write_text("built")
    assert list(tmp_path.iterdir()) == [path]


def test_waiting_ends_when_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact: although the lock is never let go."""
    path = tmp_path / "kernel.so"
    monkeypatch.setattr("megatron_s3.kernels.cpu.sole_builder._POLL", 0)
    asked = []

    def done() -> bool:
        asked.append(None)
        return len(asked) == 5

    with open(f"{path}.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with sole_builder(path, "it", done, patience=1e9):
            assert len(asked) == 5
    assert os.path.exists(f"{path}.lock")  # which is the other's


def test_a_long_wait_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, asked = tmp_path / "kernel.so", []
    monkeypatch.setattr("megatron_s3.kernels.cpu.sole_builder._POLL", 0)
    monkeypatch.setattr("megatron_s3.kernels.cpu.sole_builder._QUIET", -1)

    def done() -> bool:
        asked.append(None)
        return len(asked) == 5

    with open(f"{path}.lock", "w") as other:
        other.write("process 1 on node7")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with caplog.at_level(logging.WARNING), sole_builder(path, "it", done, patience=1e9):
            pass
    assert caplog.messages == [f"waiting for process 1 on node7, which builds it: {path}"]


@pytest.mark.parametrize("again", [False, True])
def test_a_lock_that_its_holder_removed_is_none(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was opened before the holder removed it; ``again``: a third process has made another."""
    path, flock, others = tmp_path / "kernel.so", fcntl.flock, []
    lock = Path(f"{path}.lock")
    monkeypatch.setattr("megatron_s3.kernels.cpu.sole_builder._POLL", 0)

    def late(file: int, how: int) -> None:
        if not others:
            lock.unlink()
            others.append(lock.open("w") if again else None)
            if again:
                flock(others[0], how)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    asked = []

    def done() -> bool:
        asked.append(None)
        return again and len(asked) == 3

    with sole_builder(path, "it", done, patience=1e9):
        assert len(asked) == (3 if again else 1)
        assert lock.read_text() == (
            "" if again else f"process {os.getpid()} on {os.uname().nodename}"
        )
    assert lock.exists() is again
    if again:
        others[0].close()


def test_patience_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Exact: it says for whom it has waited, and builds."""
    path = tmp_path / "kernel.so"
    with open(f"{path}.lock", "w") as other:
        other.write("process 1 on node7")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with caplog.at_level(logging.WARNING), sole_builder(path, "it", lambda: False, patience=-1):
            pass
    assert caplog.messages == ["building it: process 1 on node7 has not built it in 0 s"]


def test_without_locks_each_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with sole_builder(tmp_path / "kernel.so", "it", lambda: False, patience=0):
        pass
    assert not list(tmp_path.iterdir())


def test_a_failed_build_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "kernel.so"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), sole_builder(path, "it", path.exists, patience=0):
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
