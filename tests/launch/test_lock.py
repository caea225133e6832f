"""A run's folder belongs to one launch at a time, until the last of its processes has ended."""

import errno
import fcntl
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_s3 import data
from megatron_s3.launch import lock

REPOSITORY = Path(__file__).parents[2]
#: Another machine's kernel.
ELSEWHERE = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in (lock.VARIABLE, "PBS_JOBID", "LSB_JOBID"):
            monkeypatch.delenv(name)


def python(code: str, **environment: str) -> subprocess.Popen:
    """A process of its own that runs the code, and shows what it says."""
    return subprocess.Popen(
        [sys.executable, "-c", "import os, subprocess, sys, time\n" + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
    )


#: A launcher that starts a torchrun, which starts a rank. The rank says its process id and those of
#: two processes that it forks: from its first thread, and from another, which ends.
RANK = """
import threading
from megatron_s3.launch import lock
lock.join()
first = os.fork()
if not first:
    time.sleep(1000)
def fork():
    global other
    other = os.fork()
    if not other:
        sys.stdin.read()
        os._exit(0)
thread = threading.Thread(target=fork)
thread.start()
thread.join()
print(os.getpid(), first, other, flush=True)
time.sleep(1000)
"""
AGENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {"import os, sys, time" + RANK!r}])
"""
LAUNCHER = """
from pathlib import Path
from megatron_s3.launch import lock
with lock.hold([Path(FOLDER)], beat=BEAT) as held:
    subprocess.run(
        [sys.executable, "-c", AGENT],
        env=os.environ | held,
        preexec_fn=lambda: lock.die_with_parent(PID),
    )
"""


def launcher(folder: Path, beat: float = 10.0, **environment: str) -> subprocess.Popen:
    given = f"FOLDER, BEAT, AGENT, PID = {str(folder)!r}, {beat}, {AGENT!r}, os.getpid()\n"
    return python(given + LAUNCHER, **environment)


def record(path: Path, **changed: object) -> dict:
    """Writes what a launcher that did not end well has left."""
    left = lock._me() | {"pid": 1, "started": "0"} | changed
    path.write_text(json.dumps(left).ljust(lock._SIZE))
    return left


def gone(pid: int) -> bool:
    return lock._started(pid) is None


def test_the_second_is_told_who_holds_the_folder(tmp_path):
    with lock.hold([tmp_path]), pytest.raises(lock.InUse) as refused:
        lock.hold([tmp_path / "x" / ".."]).__enter__()
    assert re.fullmatch(
        rf"{tmp_path} is in use by another launch: process {os.getpid()} on {os.uname().nodename}, "
        r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d; wait until it ends, stop it, or "
        rf"use another folder\. If its machine is gone for good, remove {tmp_path}/lock",
        str(refused.value),
    )
    with lock.hold([tmp_path]):  # it was given back, and with the record of who held it
        pass
    assert (tmp_path / "lock").read_bytes() == b""


def test_all_folders_or_none(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    with lock.hold([other]):
        with pytest.raises(lock.InUse, match=f"^{other} is in use"), lock.hold([one, other]):
            pass
        with lock.hold([one, one]):
            pass


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_JOB_ID": "12"}, ", job 12, since"),
        (
            {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"},
            ", job 12_1, since",
        ),
        ({"PBS_JOBID": "7.host"}, ", job 7.host, since"),
        ({"LSB_JOBID": "8"}, ", job 8, since"),
    ],
)
def test_the_job_is_named(tmp_path, monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with lock.hold([tmp_path]), pytest.raises(lock.InUse, match=re.escape(said)):
        lock.hold([tmp_path]).__enter__()


@pytest.mark.parametrize("killed", ["launcher", "agent"])
def test_a_killed_launcher_leaves_no_ranks(tmp_path, killed):
    with launcher(tmp_path) as process:
        rank, fork, of_a_thread = map(int, process.stdout.readline().split())
        with pytest.raises(lock.InUse, match=f"process {process.pid} on "), lock.hold([tmp_path]):
            pass
        agent = int(lock._stat(rank)[1])
        os.kill(process.pid if killed == "launcher" else agent, signal.SIGKILL)
        process.wait()
        with lock.hold([tmp_path]):  # not before they have ended
            assert gone(rank) and gone(fork) and gone(process.pid)
            assert not gone(of_a_thread)
        process.stdin.close()


def test_a_fork_whose_parent_has_ended_already_ends(tmp_path):
    """The rank was killed before its child could ask the kernel to be told so."""
    with lock.hold([tmp_path]) as held:
        rank = python(
            "from megatron_s3.launch import lock\n"
            "rank = os.getpid()\n"
            "def orphaned():\n"
            "    while os.getppid() == rank:\n"
            "        time.sleep(0.01)\n"
            "os.register_at_fork(after_in_child=orphaned)\n"
            "lock.join()\n"
            "child = os.fork()\n"
            "print(child or 'went on', flush=True)\n"
            "os._exit(0)",
            **held,
        )
        said, _ = rank.communicate(timeout=60)  # until the child has closed its output too
    assert said.strip().isdecimal()


def test_ranks_that_live_on_keep_the_folder(tmp_path):
    """Stopped processes stand for those that a driver keeps: here the rank does not get the signal.

    A process that a rank has forked, which writes a checkpoint, say, counts like the rank.
    """
    writer = python(
        "import fcntl\n"
        f"file = open({str(tmp_path / 'lock')!r}, 'a')\n"
        "fcntl.flock(file, fcntl.LOCK_SH)\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with writer:
        writer.stdout.readline()
        left = record(tmp_path / "lock")
        with pytest.raises(lock.InUse) as refused, lock.hold([tmp_path], patience=0.3):
            pass
        writer.communicate()
    assert str(refused.value) == (
        f"{tmp_path} is in use: its last launch (process 1 on {left['host']}, since "
        f"{left['since']}) has ended, but its ranks have not: processes {writer.pid} on this "
        f"machine; end them. If their machine is gone for good, remove {tmp_path}/lock"
    )
    with lock.hold([tmp_path]):
        pass


def test_ranks_without_their_launcher_do_not_train(tmp_path):
    """It died before they asked the kernel to be told so."""
    with lock.hold([tmp_path]) as held:
        launched = json.loads(held[lock.VARIABLE])
    dead = subprocess.Popen(["true"])
    dead.wait()
    with python(RANK, **{lock.VARIABLE: json.dumps([dead.pid, *launched[1:]])}) as rank:
        assert rank.stdout.read() == ""
    assert rank.returncode == -signal.SIGKILL


def test_a_program_without_a_launcher_takes_no_lock():
    with python("from megatron_s3.launch import lock; lock.join(); print('on')") as process:
        assert process.stdout.read() == "on\n"


def test_a_dead_machine_gives_the_folder_up(tmp_path, capsys):
    left = record(tmp_path / "lock", boot=ELSEWHERE, host="elsewhere")
    with lock.hold([tmp_path], beat=0.1):
        assert lock._read(tmp_path / "lock")["pid"] == os.getpid()
    assert capsys.readouterr().out == (
        f"[megatron_s3] {tmp_path}: process 1 on elsewhere, since {left['since']} holds the "
        "lock; checking for 0 s whether it is alive\n"
    )


def test_a_disk_that_keeps_locks_to_each_machine(tmp_path):
    """The other machine's lock is not seen here, its signs of life are."""
    path = tmp_path / "lock"
    left = record(path, boot=ELSEWHERE, host="elsewhere")
    file = os.open(path, os.O_RDWR)
    end = threading.Event()
    alive = threading.Thread(target=lock._live, args=(file, left, 0.05, end))
    alive.start()
    try:
        with pytest.raises(lock.InUse, match="process 1 on elsewhere"), lock.hold([tmp_path], 1):
            pass
    finally:
        end.set()
        alive.join()
        os.close(file)


def test_the_next_attempt_of_a_job_does_not_wait(tmp_path, monkeypatch, capsys):
    """SLURM has ended the one before, on a node that died, say."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    record(tmp_path / "lock", boot=ELSEWHERE, host="elsewhere")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lock.hold([tmp_path], beat=1000):
        pass
    assert capsys.readouterr().out == ""


@pytest.fixture
def _without_flock(monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("_without_flock")
def test_a_disk_without_flock(tmp_path):
    path = tmp_path / "lock"
    in_use = "in use by another launch: process"
    with lock.hold([tmp_path], beat=0.05), pytest.raises(lock.InUse, match=in_use):
        lock.hold([tmp_path], beat=1).__enter__()
    record(path)
    with lock.hold([tmp_path], beat=1000):  # a process of this machine that is no more
        pass
    me = lock._me()
    record(path, pid=me["pid"], started=me["started"], boot=ELSEWHERE)
    with lock.hold([tmp_path], beat=0.1):
        pass


@pytest.mark.usefixtures("_without_flock")
def test_ranks_of_a_disk_without_flock_train(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "die_with_parent", lambda parent: None)
    with lock.hold([tmp_path], beat=0.05) as held:
        launched = json.loads(held[lock.VARIABLE])
    monkeypatch.setenv(lock.VARIABLE, json.dumps([os.getppid(), *launched[1:]]))
    lock.join()


def test_a_rank_whose_folder_was_taken_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "die_with_parent", lambda parent: None)
    path = tmp_path / "lock"
    monkeypatch.setenv(lock.VARIABLE, json.dumps([os.getppid(), str(path)]))
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(lock.InUse, match="another launch has locked the folder"):
            lock.join()


def test_of_many_at_once_one_has_it(tmp_path):
    """All start when the file appears; each says whether it has the folder, and keeps it."""
    code = f"""
from pathlib import Path
from megatron_s3.launch import lock
while not os.path.exists({str(tmp_path / "go")!r}):
    time.sleep(0.001)
try:
    with lock.hold([Path({str(tmp_path / "run")!r})]):
        print("has it", flush=True)
        sys.stdin.read()
except lock.InUse:
    print("refused", flush=True)
"""
    racers = [python(code) for _ in range(6)]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    said = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.communicate()
    assert sorted(said) == ["has it", *["refused"] * 5]


@pytest.mark.parametrize("program", ["megatron_s3.quickstart", "scripts.experiments.runner"])
def test_other_programs_that_train_hold_their_folder_too(tmp_path, monkeypatch, capsys, program):
    module = importlib.import_module(program)
    text = tmp_path / "in.jsonl"
    text.write_text('{"text": "%s"}\n' % ("some words " * 40) * 20)
    made = data.source(str(text), "text", None)
    monkeypatch.setattr(data, "source", lambda *args: made)
    out = tmp_path / "out"
    with lock.hold([out]):
        assert module.main(["--out", str(out), "--iters", "20"]) == 2
    said = capsys.readouterr().err
    assert f"error: {out} is in use by another launch: process {os.getpid()} on " in said
