"""A disk that takes nothing ends no training: it is said once, and what waited is written later."""

import errno
import os
from pathlib import Path

import pytest

from megatron_s3.telemetry import runlog
from megatron_s3.telemetry.runlog import RunLog, read
from megatron_s3.telemetry.writers import Careful


def iterations(folder: Path) -> list[int]:
    return [record["iteration"] for record in read(folder)]


def log_some(log: RunLog, *numbers: int) -> None:
    for i in numbers:
        log.write("train", {"iteration": i})


@pytest.mark.parametrize("rank", ["0", "3"])
def test_a_device_that_is_always_full(rank, tmp_path, monkeypatch, capsys):
    """Megatron's last rank writes the log, and says so whichever rank it is."""
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path)
    log_some(log, 1, 2, 3)
    log.close()
    assert capsys.readouterr().out == (
        f"[megatron_s3] {tmp_path}/metrics.jsonl cannot be written: No space left on device; "
        "training goes on\n"
    )
    (tmp_path / "metrics.jsonl").unlink()
    log_some(log, 4)
    assert iterations(tmp_path) == [1, 2, 3, 4]
    assert capsys.readouterr().out == (
        f"[megatron_s3] {tmp_path}/metrics.jsonl is written again, and no line is lost\n"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("taken", [0, 1, 10])
def test_a_line_of_which_a_part_is_taken(number, taken, tmp_path, monkeypatch, capsys):
    log, whole = RunLog(tmp_path), runlog._write_all
    log_some(log, 1)

    def part(file, line):
        whole(file, line[:taken])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runlog, "_write_all", part)
    log_some(log, 2, 3)
    monkeypatch.setattr(runlog, "_write_all", whole)
    log_some(log, 4)
    assert iterations(tmp_path) == [1, 2, 3, 4]
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"cannot be written: {os.strerror(number)}; training goes on")
    assert second.endswith("is written again, and no line is lost")


def test_only_so_many_lines_wait(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runlog, "KEPT", 2)
    folder = tmp_path / "folder"
    folder.write_text("no folder")
    log = RunLog(folder)
    log_some(log, 1, 2, 3)
    folder.unlink()
    log_some(log, 4)
    assert iterations(folder) == [3, 4]
    assert capsys.readouterr().out.splitlines()[1].endswith("is written again; 2 lines are lost")
    log_some(log, 5)
    assert not capsys.readouterr().out
    (folder / runlog.NAME).unlink()
    folder.rmdir()
    folder.write_text("no folder")  # once more
    log_some(log, 6)
    folder.unlink()
    log_some(log, 7)
    first, second = capsys.readouterr().out.splitlines()
    assert "cannot be written" in first and second.endswith("again, and no line is lost")


def test_a_full_disk_under_the_output_too(tmp_path, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr("sys.stdout", Full())
    log_some(RunLog(tmp_path), 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboards_log(tmp_path, capsys):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    inner = tensorboard.SummaryWriter(tmp_path)
    writer = Careful(inner, "TensorBoard's log")
    writer.add_scalar("loss", 1.0, 1)
    writer.flush()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    record_writer = inner.file_writer.event_writer._async_writer._writer
    record_writer.write = record_writer.flush = full
    for i in range(2, 40):
        writer.add_scalar("loss", 1.0, i)
    writer.flush()
    assert capsys.readouterr().out == (
        "[megatron_s3] TensorBoard's log cannot be written: No space left on device; training goes "
        "on without it\n"
    )
    assert writer.log_dir == tmp_path
