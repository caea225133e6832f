"""Locks of a run's folders: one launch at a time writes to them, until its last process ends.

The lock is ``flock`` on the file ``lock`` of a folder; the kernel releases it when its holders die.
The launcher takes it exclusively and then shares it with its ranks. Each rank holds it as long as
it lives (:func:`join`), so ranks that outlive their launcher keep the next launch out. This does
not take long: the kernel kills torchrun when its launcher dies, and the ranks when torchrun dies.

On some shared disks ``flock`` works on one machine only, or not at all. The file therefore also
records the holder, with a number that increases every few seconds. If a launch that ended badly
left such a record on another machine, the next one checks whether the number still increases.
"""

import contextlib
import ctypes
import datetime
import errno
import fcntl
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from megatron_s3.errors import MegatronS3Error
from megatron_s3.log import say_here

__all__ = ["VARIABLE", "InUse", "die_with_parent", "hold", "join", "variable"]

#: Passes the launcher's process id and the files to the ranks, as a JSON list.
VARIABLE = "MEGATRON_S3_LOCK"

_SIZE = 1024  # of every record, so that no reader sees half of one
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl


class InUse(MegatronS3Error):
    """Raised if another launch writes to the folder; the message says which one and what to do."""


@contextlib.contextmanager
def hold(
    folders: Sequence[Path], beat: float = 10.0, patience: float = 100.0
) -> Iterator[dict[str, str]]:
    """Locks folders for this process and the ranks that it starts.

    Args:
        folders: the folders; missing ones are created.
        beat: seconds between two updates of the record; the same for all launches.
        patience: seconds to wait for processes of a dead launch to end, before the folder counts as
            in use. NFS keeps a dead machine's locks for 90.

    Yields:
        The environment variable that the ranks need for :func:`join`.

    Raises:
        InUse: another launch, or ranks of a dead one, hold one of the folders.
        OSError: a folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_held(folder / "lock", beat, patience))
        yield variable(folders)


class _Record(TypedDict):
    """The launcher's record of itself in the lock file."""

    host: str
    boot: str
    pids: str
    pid: int
    started: str | None
    job: str
    attempt: str
    since: str
    beat: int


def variable(folders: Sequence[Path]) -> dict[str, str]:
    """Returns the environment variable for :func:`join`, also on a job's other nodes.

    Args:
        folders: the folders that the job's first node locks before there are ranks.
    """
    paths = [os.path.join(os.path.realpath(folder), "lock") for folder in folders]
    return {VARIABLE: json.dumps([os.getpid(), *dict.fromkeys(paths)])}


def join() -> None:
    """Locks the run's folders for a rank while it lives, and ends it when its launcher ends.

    Does nothing in a process that was not started by a launcher.

    Raises:
        InUse: the launcher has ended, and another one has locked the folder.
    """
    if VARIABLE not in os.environ:
        return
    launcher, *paths = json.loads(os.environ[VARIABLE])
    die_with_parent(os.getppid())
    # The launcher, or a process between, may have died before the kernel was asked.
    if launcher not in _ancestors():
        os.kill(os.getpid(), signal.SIGKILL)
    files = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644) for path in paths]
    for path, file in zip(paths, files, strict=True):
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"{path}: another launch has locked the folder") from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
    _bind_forks(files)


def _bind_forks(files: list[int]) -> None:
    """Makes processes that a rank forks (to write a checkpoint) hold its locks and end with it.

    Otherwise Megatron's writer processes would stay forever when a rank is killed. The kernel
    watches the thread that forks, and other threads than the first may end early: a child of such a
    thread holds no lock.
    """
    by_first_thread, parent = True, 0

    def before() -> None:
        nonlocal by_first_thread, parent
        parent = os.getpid()
        by_first_thread = threading.get_native_id() == parent

    def in_child() -> None:
        if by_first_thread:
            die_with_parent(parent)
            return
        for file in files:
            os.close(file)
        files.clear()

    os.register_at_fork(before=before, after_in_child=in_child)


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when the thread that started it ends.

    Args:
        parent: the process id of the parent, taken before this process was started.  If the parent
            has ended already, which the kernel does not report later, this process ends here.
    """
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _held(path: Path, beat: float, patience: float) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        locks = _take(file, path, patience)
        left = _read(path)
        if left and not _is_dead(left, locks) and _beats(path, left, beat):
            raise InUse(_in_use(path, left))
        mine = _me()
        _write(file, mine)
        if locks:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # another launch was faster and has seen this one's record
                raise InUse(_in_use(path, _read(path))) from None
        else:
            time.sleep(min(beat, 1.0))
            found = _read(path)
            if found and found["pid"] != mine["pid"]:
                raise InUse(_in_use(path, found))
        end = threading.Event()
        thread = threading.Thread(target=_live, args=(file, mine, beat, end), daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
    finally:
        os.close(file)


def _take(file: int, path: Path, patience: float) -> bool:
    """Locks the file exclusively; returns False if the disk has no flock."""
    began = time.monotonic()
    said = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            holder = _read(path)
            if holder and not _is_dead(holder, locks=False):
                raise InUse(_in_use(path, holder)) from None
            if time.monotonic() > began + patience:
                raise InUse(_left_over(path, holder)) from None
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return False
            raise
        if not said and time.monotonic() > began + 1:
            said = True
            say_here(f"{path.parent}: waiting for the ranks of the previous launch to end")
        time.sleep(0.1)


def _is_dead(holder: _Record, locks: bool) -> bool:
    """Returns whether the launcher in a record is known to have ended.

    Args:
        holder: the record.
        locks: whether this process has just got the lock.
    """
    me = _me()
    if holder["job"] and holder["job"] == me["job"] and holder["attempt"] != me["attempt"]:
        return True  # SLURM ends an attempt before it starts the next
    if holder["boot"] != me["boot"]:
        return False
    if locks:
        return True  # the same kernel gave the lock, which it would not do if the other were alive
    return holder["pids"] == me["pids"] and _started(holder["pid"]) != holder["started"]


def _beats(path: Path, seen: _Record, beat: float) -> bool:
    """Returns whether the holder updates its record within three beats."""
    say_here(
        f"{path.parent}: {_who(seen)} holds the lock; checking for {3 * beat:.0f} s whether it is "
        "alive"
    )
    deadline = time.monotonic() + 3 * beat
    while time.monotonic() < deadline:
        time.sleep(beat / 10)
        if _read(path) != seen:
            return True
    return False


def _live(file: int, record: _Record, beat: float, end: threading.Event) -> None:
    while not end.wait(beat):
        record["beat"] += 1
        with contextlib.suppress(OSError):  # a full or failing disk must not end training
            _write(file, record)


def _me() -> _Record:
    """Returns this process's record."""
    environment = os.environ
    job = environment.get("SLURM_JOB_ID") or environment.get("PBS_JOBID")
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return {
        "host": platform.node(),
        "boot": _boot(),
        "pids": os.readlink("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": job or environment.get("LSB_JOBID") or "",
        "attempt": environment.get("SLURM_RESTART_COUNT", "0"),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "beat": 0,
    }


def _boot() -> str:
    """Returns a value that identifies the boot of a machine or the start of a container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _write(file: int, record: _Record) -> None:
    os.pwrite(file, json.dumps(record).encode().ljust(_SIZE), 0)
    os.fsync(file)


def _read(path: Path) -> _Record | None:
    """Reads the record; None if the last launch ended well or has written none yet."""
    try:
        record: _Record | None = json.loads(path.read_bytes() or b"null")
        return record
    except (OSError, ValueError):
        return None


def _stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat from the state on, which is field 3 in proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _started(pid: int) -> str | None:
    """Returns when a process started, in ticks since boot; None if there is no such process."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else None


def _ancestors() -> Iterator[int]:
    pid = os.getppid()
    while pid > 0:
        yield pid
        fields = _stat(pid)
        pid = int(fields[1]) if fields else 0


def _who(holder: _Record) -> str:
    job = f", job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"


def _in_use(path: Path, holder: _Record | None) -> str:
    who = f": {_who(holder)}" if holder else ""
    return (
        f"{path.parent} is in use by another launch{who}; wait until it ends, stop it, or use "
        f"another folder. If its machine is gone for good, remove {path}"
    )


def _left_over(path: Path, holder: _Record | None) -> str:
    who = f" ({_who(holder)})" if holder else ""
    here = _holders(path)
    which = f": processes {', '.join(map(str, here))} on this machine" if here else ""
    return (
        f"{path.parent} is in use: its last launch{who} has ended, but its ranks have not{which}; "
        f"end them. If their machine is gone for good, remove {path}"
    )


def _holders(path: Path) -> list[int]:
    """Returns the processes on this machine that hold the lock, according to /proc/locks."""
    inode = str(path.stat().st_ino)
    with contextlib.suppress(OSError):
        rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return sorted({int(r[4]) for r in rows if r[1] == "FLOCK" and r[5].endswith(":" + inode)})
    return []
