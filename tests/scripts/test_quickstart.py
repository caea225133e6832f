"""The first run, from text to table and picture."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_s3 import data, quickstart, report
from megatron_s3.launch import shown
from megatron_s3.launch.config import load

LOG_LINE = (
    " [2026-01-01 00:00:00.000000] iteration       30/     100 | consumed samples:          480 | "
    "elapsed time per iteration (ms): 128.0 | learning rate: 3.000000E-03 | global batch size:    "
    "16 | lm loss: 3.176437E+00 | loss scale: 1.0 | number of skipped iterations:   0 |\n"
)


def test_progress_shows_iteration_loss_speed_and_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = shown._Progress(quickstart.BATCH * quickstart.SEQ_LENGTH)
    progress.read("building datasets\n")
    progress.read(LOG_LINE)
    progress.read(LOG_LINE.replace(" 30/", "100/"))
    progress.close()
    first, last = capsys.readouterr().out.splitlines()
    assert first == "  iteration 30/100  loss 3.176  16,000 tokens/s  0:08 left"
    assert last.startswith("  iteration 100/100")


def test_tail_is_the_last_launchs_and_ends_where_torchrun_reports(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    noise = [f"noise {i}" for i in range(40)]
    report_lines = ["E1 torch/x.py] failed (exitcode: 1) local_rank: 0", "Traceback", "ChildFailed"]
    log.write_text("\n".join(["$ one", "old", *report_lines, "$ two", *noise, "Error: the reason",
                              *report_lines]))  # fmt: skip
    tail = shown.tail(log)
    assert tail[-1] == "Error: the reason"
    assert len(tail) == shown._TAIL_LINES
    log.write_text("$ two\nonly line")
    assert shown.tail(log) == ["$ two", "only line"]


def test_an_interrupted_launch_ends_and_its_last_output_is_kept(
    tmp_path: Path, monkeypatch
) -> None:
    """Ranks that save and end at a signal print more than a pipe holds."""
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/bash\ntrap 'yes line | head -n 50000; echo saved; exit 75' TERM\n"
        "echo begun\nwhile true; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def interrupted(self: object, line: str) -> None:
        raise KeyboardInterrupt

    def too_late(number: int, frame: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(shown._Progress, "read", interrupted)
    previous = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(20)
    try:
        with pytest.raises(KeyboardInterrupt):
            shown.launch(["tiny-s3"], tmp_path / "train.log", tokens=1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert shown.tail(tmp_path / "train.log")[-1] == "saved"


def test_recipes_keep_the_papers_rule_for_weight_decay() -> None:
    rates = [quickstart._rates(load([config])) for config in quickstart.RUNS.values()]
    products = [rate["lr"] * rate["weight_decay"] for rate in rates]
    assert products == pytest.approx([3e-5, 3e-5])


def test_another_directory_of_the_users_is_not_removed(tmp_path: Path) -> None:
    theirs = tmp_path / "s3" / "thesis.txt"
    theirs.parent.mkdir()
    theirs.touch()
    args = quickstart._arguments(["--out", str(tmp_path)])
    dataset = {"sha256": "", "valid": {"bytes": 10**6}}
    with pytest.raises(quickstart.QuickstartError, match="--out"):
        quickstart._train("S3", args, 1, "no-data", dataset)
    assert theirs.exists()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("megatron.training")
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"{i} times a line of text\n" * 100)
    return folder


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_s3.quickstart", *map(str, arguments)]
    root = str(Path(quickstart.__file__).parents[1])
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )


def figures(output: str, label: str) -> list[float]:
    line = next(line for line in output.splitlines() if line.startswith(label))
    return [float(v) for v in re.findall(r"[\d.]*\d", line[len(label) : 40].replace(",", ""))]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (data.IncompleteError("hub: ReadTimeout"), "hub: ReadTimeout"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_what_a_network_or_a_disk_breaks_off_is_one_line(
    error: Exception, said: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(data, "build", fails)
    assert quickstart.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {said}; run the same command again to continue\n"


@pytest.mark.slow
def test_first_run_resumes_reports_and_is_reused(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["--input", text, "--iters", "10", "--out", out]
    first = call(*command)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "resumed in a new process from the checkpoint of iteration 5" in first.stdout

    # Both launches are there, and the second one began where the first one had stopped.
    log = (out / "s3" / "train.log").read_text()
    done = [int(i) for i in re.findall(r"iteration +(\d+)/ +10 \|", log)]
    assert log.count("\n$ ") + log.startswith("$ ") == 2
    assert done == sorted(set(done))
    run = report.read(out / "s3" / "tensorboard", "S3")
    assert list(run.scalars["lm loss"]) == list(range(1, 11))

    summary = report.summarize(run)
    assert summary.valid_loss is not None
    assert figures(first.stdout, "validation loss") == [pytest.approx(summary.valid_loss, abs=6e-4)]
    entropy = json.loads((out / "data" / "text.json").read_text())["unigram_entropy"]
    assert figures(first.stdout, "unigram entropy") == [pytest.approx(entropy, abs=6e-4)]
    [update] = figures(first.stdout, "largest |update|")
    assert 0 < update <= 1
    [speed] = figures(first.stdout, "tokens per second")
    assert speed > 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    for path in ("s3/checkpoints", "s3/tensorboard", "loss.png"):
        assert str(out / path) in first.stdout

    again = call(*command)
    assert again.returncode == 0, again.stderr
    assert "finished before" in again.stdout
    assert "(reused)" in again.stdout
    assert (out / "s3" / "train.log").read_text() == log
    assert again.stdout.splitlines()[-8:] == first.stdout.splitlines()[-8:]

    compared = call(*command, "--compare")
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert (out / "s3" / "train.log").read_text() == log
    losses = figures(compared.stdout, "validation loss")
    assert losses[0] == pytest.approx(summary.valid_loss, abs=6e-4)
    assert len(losses) == 2


@pytest.mark.slow
def test_failed_training_shows_the_reason_and_the_log(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "train.log"
    with pytest.raises(quickstart.QuickstartError, match=str(log)):
        quickstart._launch(["quickstart/s3", "--no-such-flag"], log, 0)
    assert "--no-such-flag" in capsys.readouterr().err
