"""Signals as schedulers send them, on a stand-in for torchrun with two ranks that save at one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_s3.launch import launch, stopping
from megatron_s3.launch.config import ConfigError, load

REPOSITORY = Path(__file__).parents[2]

LAUNCHER = """
import os, sys
from megatron_s3.launch.stopping import StopRequest
with StopRequest() as stop:
    with stop.start([sys.executable, *sys.argv[1:]], dict(os.environ)) as process:
        status = process.wait()
print(stop.asked_by, stop.killed, status, flush=True)
"""

#: Ends at signals as torchrun does, and starts each rank in a session of its own.
AGENT = """
import signal, subprocess, sys
def end(number, frame):
    sys.exit(1)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, end)
ranks = [
    subprocess.Popen([sys.executable, *sys.argv[1:], name], start_new_session=True)
    for name in ("first", "second")
]
sys.exit(max(rank.wait() for rank in ranks))
"""

RANK = """
import os, pathlib, signal, sys
from megatron_s3.launch import lock
lock.die_with_parent(os.getppid())
folder, name = map(pathlib.Path, sys.argv[1:])
def save(number, frame):
    if "stubborn" not in os.environ:
        (folder / f"{name}.saved").touch()
        sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / f"{name}.pid").write_text(str(os.getpid()))
(folder / f"{name}.ready").touch()
while True:
    signal.pause()
"""


def until(condition) -> None:
    """Waits; a test that never comes to an end is ended by whoever runs it."""
    while not condition():
        time.sleep(0.02)


def _not_ignoring() -> None:
    """A shell starts jobs in the background with SIGINT ignored, nohup with SIGHUP ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def launcher(tmp_path):
    """Starts it in a process group of its own; its process, when both ranks are ready."""
    for name, text in {"launcher": LAUNCHER, "agent": AGENT, "rank": RANK}.items():
        (tmp_path / f"{name}.py").write_text(text)
    started = []

    def start(*before: str, **environment: str) -> subprocess.Popen:
        words = [tmp_path / f"{name}.py" for name in ("launcher", "agent", "rank")]
        process = subprocess.Popen(
            [*before, sys.executable, *words, tmp_path],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), **environment},
            start_new_session=True,
            preexec_fn=_not_ignoring,
        )
        started.append(process)
        until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def living(folder: Path) -> list[int]:
    """Process ids of the ranks that have not ended."""
    return [pid for file in folder.glob("*.pid") if not gone(pid := int(file.read_text()))]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("name", [n.name for n in stopping.SIGNALS])
def test_a_signal_to_the_process_group_saves(name, launcher, tmp_path):
    process = launcher()
    os.killpg(process.pid, signal.Signals[name])
    said = process.communicate()[0].splitlines()
    assert said == [
        f"[megatron_s3] {name} received: the ranks save a checkpoint and end",
        f"{name} False 0",
    ]
    assert len(list(tmp_path.glob("*.saved"))) == 2 and not living(tmp_path)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_to_every_process_saves(name, launcher, tmp_path):
    """As SLURM's without ``--batch``."""
    process = launcher()
    (agent,) = stopping._ranks(process.pid)
    for pid in (*stopping._ranks(agent), agent, process.pid):
        os.kill(pid, signal.Signals[name])
    assert process.communicate()[0].splitlines()[-1] == f"{name} False 0"
    assert len(list(tmp_path.glob("*.saved"))) == 2


def test_a_second_interrupt_kills(launcher, tmp_path):
    process = launcher(stubborn="1")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("[megatron_s3] SIGINT received: the ranks save")
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == "SIGINT True -9\n"
    until(lambda: not living(tmp_path))


def test_no_rank_outlives_a_launcher_that_is_killed(launcher, tmp_path):
    process = launcher()
    process.kill()
    until(lambda: not living(tmp_path))
    assert not list(tmp_path.glob("*.saved"))


def test_what_nohup_ignores_stays_ignored(launcher, tmp_path):
    process = launcher("nohup")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0].splitlines()[-1] == "SIGTERM False 0"


def test_an_interrupt_before_there_are_ranks_ends_the_launcher():
    with stopping.StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.asked_by is None


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["exit_signal_handler=false"],
            "tiny-s3: exit_signal_handler is off, so the ranks would not save",
        ),
        (["exit_signal_handler_for_training=true"], "before exit_signal_handler can save"),
        (
            ["exit_signal=SIGKILL"],
            "must be a signal that a process can catch, such as SIGTERM, not",
        ),
        (["exit_signal=TERM"], "--set exit_signal=TERM: exit_signal must be a signal"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--slurm"]])
def test_a_signal_that_nobody_serves_is_refused(sets, message, more, tmp_path, capsys):
    words = ["tiny-s3", "--run-dir", str(tmp_path), *(f"--set={word}" for word in sets), *more]
    assert launch.main(words) == 2
    assert message in capsys.readouterr().err


def test_the_ranks_are_sent_the_signal_that_they_wait_for():
    assert stopping.exit_signal(load(["tiny-s3"])) == signal.SIGTERM
    assert stopping.exit_signal(load(["tiny-s3"], ["exit_signal=SIGUSR2"])) == signal.SIGUSR2
    with pytest.raises(ConfigError):
        stopping.exit_signal(load(["tiny-s3"], ["exit_signal_handler=null"]))


def test_a_rank_that_has_just_ended_keeps_the_signal_from_no_other(monkeypatch) -> None:
    told = []

    def kill(pid: int, number: int) -> None:
        told.append(pid)
        if len(told) == 1:
            raise ProcessLookupError

    class Agent:
        pid = 0

        def poll(self) -> int | None:
            return 0 if told else None

    monkeypatch.setattr(stopping.os, "kill", kill)
    monkeypatch.setattr(stopping, "catches", lambda pid, number: True)
    monkeypatch.setattr(stopping, "_ranks", lambda agent: {1, 2})
    stopping._stop_ranks(Agent(), signal.SIGTERM)
    assert sorted(told) == [1, 2]
