"""Ends the ranks with a checkpoint when a scheduler, timeout(1) or a terminal sends a signal.

Only the launcher needs the signal, but many tools send it to the process group or to every process
of a job. Torchrun therefore runs in a session of its own, and torchrun and its ranks ignore signals
for which they have no handler. The launcher sends each rank the signal at which Megatron saves and
ends. It sends none to torchrun, which would kill the ranks after 30 seconds; torchrun does so if
SIGTERM is sent to every process.
"""

import contextlib
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

#: Signals that only the launcher handles; they would end any other process.
FOR_THE_LAUNCHER = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

#: Signals that ask for an end: from SLURM, PBS, LSF and Grid Engine, from a terminal, and at the
#: end of a session.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *FOR_THE_LAUNCHER)


def exit_signal(config: Config) -> signal.Signals:
    """Returns the signal at which the ranks of a configuration save a checkpoint and end.

    Raises:
        ConfigError: there is none, so a stop before the last iteration would lose work.
    """
    given = config.arguments
    if given.get("exit_signal_handler") is not True:
        raise ConfigError(
            f"{config.name}: exit_signal_handler is off, so the ranks would not save at a time "
            "limit, scancel or Ctrl-C; --set exit_signal_handler=true"
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
            f"catch, such as SIGTERM, not {name!r}"
        )
    return number


class StopRequest:
    """Handles :data:`SIGNALS`, from before the ranks start until they have ended.

    SIGINT and SIGHUP stay ignored if they were ignored before (nohup, background jobs). SIGINT ends
    the launcher itself while it has no ranks; a second SIGINT kills the ranks.

    Args:
        number: the signal for the ranks.

    Attributes:
        asked_by: name of the first signal received, if any.
        killed: whether the ranks were killed before they could save.
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
        """Starts torchrun; if a signal has arrived already, the ranks are stopped at once.

        Args:
            command: the command.
            environment: its complete environment.
        """
        # No thread of this process holds a lock that the child would need.
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
            process.kill()  # and the kernel ends its ranks
        elif not self.asked_by:
            self.asked_by = signal.Signals(number).name
            os.write(self._write, b"!")  # a handler may interrupt the holder of a lock

    def _serve(self) -> None:
        if os.read(self._read, 1):
            say(f"{self.asked_by} received: the ranks save a checkpoint and end")
            self._running.wait()
            assert self._process is not None  # set before _running
            _stop_ranks(self._process, self.number)
        os.close(self._read)


def _in_child(parent: int) -> None:
    lock.die_with_parent(parent)
    for number in FOR_THE_LAUNCHER:
        signal.signal(number, signal.SIG_IGN)


def _stop_ranks(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Sends each rank one signal, as soon as the rank can handle it."""
    told: set[int] = set()
    while process.poll() is None:
        for pid in _ranks(process.pid) - told:
            if catches(pid, number):
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, number)
                told.add(pid)
        threading.Event().wait(0.5)


def _ranks(agent: int) -> set[int]:
    """Returns the processes that torchrun has started."""
    try:
        return set(map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text().split()))
    except OSError:
        return set()


def catches(pid: int, number: int) -> bool:
    """Returns whether a process has a handler for the signal; without one it would die."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    mask = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(mask >> (number - 1) & 1)
