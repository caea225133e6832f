"""Ends the ranks with a checkpoint when a scheduler, timeout(1) or a terminal asks for an end.

The launcher alone has to have the signal, but many send it to the process group, or to every
process of a job. Torchrun therefore runs in a session of its own and, as its ranks do, ignores the
signals that nobody there waits for; the launcher sends each rank the one at which Megatron saves
and ends. Torchrun itself is left alone, since it would kill the ranks after 30 seconds; so it does
where SIGTERM is sent to every process.
"""

import functools
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType

from megatron_s3.launch import lock
from megatron_s3.launch.config import Config, ConfigError
from megatron_s3.log import say

__all__ = ["FOR_THE_LAUNCHER", "SIGNALS", "StopRequest", "exit_signal"]

#: What nothing but the launcher waits for; it would end any other process.
FOR_THE_LAUNCHER = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

#: What asks for an end: of SLURM, PBS, LSF and Grid Engine, of a terminal, of a session's end.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *FOR_THE_LAUNCHER)


def exit_signal(config: Config) -> signal.Signals:
    """Returns the signal at which the ranks of a configuration save a checkpoint and end.

    Raises:
        ConfigError: there is none, so that every end before the last iteration would lose work.
    """
    given = config.arguments
    if given.get("exit_signal_handler") is not True:
        raise ConfigError(
            f"{config.name}: exit_signal_handler is not on, and without it no signal makes the "
            "ranks save before they end (a time limit, scancel, Ctrl-C); --set "
            "exit_signal_handler=true"
        )
    if "exit_signal_handler_for_training" in given:
        raise ConfigError(
            f"{config.where('exit_signal_handler_for_training')}: exit_signal_handler_for_training "
            "ends the ranks at a signal before exit_signal_handler can save; leave it out"
        )
    name = str(given.get("exit_signal", "SIGTERM"))
    number = signal.Signals.__members__.get(name)
    if number is None or number in (signal.SIGKILL, signal.SIGSTOP):
        raise ConfigError(
            f"{config.where('exit_signal')}: exit_signal must be a signal that a process can "
            f"catch, as SIGTERM, not {name!r}"
        )
    return number


class StopRequest:
    """Takes :data:`SIGNALS`, from before the ranks start (checks take seconds) until they ended.

    SIGINT and SIGHUP stay ignored if they were (nohup, background jobs). SIGINT ends the launcher
    itself as long as it has no ranks, and a second one kills them.

    Args:
        number: the signal that is sent to the ranks.

    Attributes:
        asked_by: name of the first signal that came, if any.
        killed: whether the ranks were not left to save.
    """

    def __init__(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.number = number
        self.asked_by: str | None = None
        self.killed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._running = threading.Event()

    def __enter__(self) -> "StopRequest":
        self._read, self._write = os.pipe()
        threading.Thread(target=self._serve, daemon=True).start()
        self._previous = {}
        for number in SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (ignored and number in (signal.SIGINT, signal.SIGHUP)):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._write)

    def start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Starts torchrun; asks its ranks to end as soon as they can if a signal has come already.

        Args:
            command: to run.
            environment: all of it.
        """
        # Nothing here runs threads that hold a lock which the child would need.
        self._process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=functools.partial(_in_child, os.getpid()),
        )
        self._running.set()
        return self._process

    def _ask(self, number: int, frame: FrameType | None) -> None:
        process = self._process
        if number == signal.SIGINT and process is None:
            raise KeyboardInterrupt
        if number == signal.SIGINT and process is not None and self.asked_by:
            self.killed = True
            process.kill()  # and the kernel its ranks
        elif not self.asked_by:
            self.asked_by = signal.Signals(number).name
            os.write(self._write, b"!")  # a handler may interrupt whoever holds a lock

    def _serve(self) -> None:
        if os.read(self._read, 1):
            say(f"{self.asked_by}: the ranks are asked to save and end")
            self._running.wait()
            assert self._process is not None  # set before _running
            _stop_ranks(self._process, self.number)
        os.close(self._read)


def _in_child(parent: int) -> None:
    lock.die_with_parent(parent)
    for number in FOR_THE_LAUNCHER:
        signal.signal(number, signal.SIG_IGN)


def _stop_ranks(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Sends each rank one signal, as soon as it is ready to take it."""
    told: set[int] = set()
    while process.poll() is None:
        for pid in _ranks(process.pid) - told:
            if catches(pid, number):
                os.kill(pid, number)
                told.add(pid)
        threading.Event().wait(0.5)


def _ranks(agent: int) -> set[int]:
    """Returns the processes that torchrun started."""
    try:
        return set(map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text().split()))
    except OSError:
        return set()


def catches(pid: int, number: int) -> bool:
    """Returns whether a process has a handler for the signal; without one it would just die."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    mask = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(mask >> (number - 1) & 1)
