"""Ranks as forks of one process that has imported torch and Megatron already.

Importing them takes ten times as long as a short training. A rank is a process of its own, with its
own process group, argv and environment, as torchrun's are.
"""

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_s3.launch import lock

from .ports import free_port

__all__ = ["TIMED_OUT", "TRAINER", "Ended", "Forks", "fork", "kill", "prepare"]
__all__ += ["first", "run_program", "start", "wait"]

TRAINER = "megatron_s3.pretrain_gpt"
#: The exit status of ranks that were stopped at their limit, as timeout(1) has it.
TIMED_OUT = 124

#: What a training run imports besides, and takes seconds.
_NEEDED = (
    "megatron.core.tokenizers.text",  # transformers
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.models.mimo",
)

#: What is imported where Megatron is not.
_OTHERS = {
    # For tests of torch's own sharding.
    "optimizers": (
        "megatron_s3.optimizers",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "pytest",
    ),
    # What takes long of what Megatron imports of torch.
    "torch": (
        "torch._inductor.compile_fx",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch.utils.cpp_extension",
    ),
}

_READY = "ready to fork\n"
_REPOSITORY = Path(__file__).resolve().parents[2]


class Forks:
    """A process that has imported torch and, unless told otherwise, Megatron with the plugin.

    It ends with the process that made it.

    Args:
        megatron: folder that holds the ``megatron`` to import; the installed one if None.
        program: what the ranks run, a module's name or a script's path. A script is imported
            beforehand.
        imports: what it imports beforehand: ``megatron``, or of torch what ``optimizers`` or
            Megatron (``torch``) import.

    Raises:
        RuntimeError: it cannot be imported; with the traceback.
    """

    def __init__(
        self,
        megatron: str | Path | None = None,
        program: str | Path = TRAINER,
        *,
        imports: str = "megatron",
    ) -> None:
        self._program = str(program)
        # A Megatron-LM tree has a package `tests`, too.
        path = [str(p) for p in (_REPOSITORY, megatron, os.environ.get("PYTHONPATH")) if p]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self._program, imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(path),
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "ignore",
                "LOCAL_WORLD_SIZE": "8",  # ranks at most: registering makes as many devices
            },
        )
        said = []  # what importing says
        for line in self._process.stdout:
            if line == _READY:
                return
            said.append(line)
        raise RuntimeError("".join(said).strip())

    def run(
        self,
        argv: Sequence[str],
        ranks: int,
        log: str | Path,
        program: str | Path | None = None,
        limit: float = 0,
    ) -> int:
        """Runs a program on so many ranks and waits; when one fails the others are killed.

        Args:
            argv: the program's arguments.
            ranks: number of processes, 8 at most.
            log: file to which all of them append what they print.
            program: another one than that of all runs.
            limit: seconds after which all are killed; 0: none.

        Returns:
            The exit status of the first that failed, else 0; :data:`TIMED_OUT`.

        Raises:
            RuntimeError: the forking process itself has ended.
        """
        request = {"argv": list(map(str, argv)), "ranks": ranks, "log": str(log)}
        request |= {"program": str(program or self._program), "limit": limit}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks ranks has ended: {self._process.wait()}")
        return int(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Answers each request, one JSON object a line of standard input, with the exit status."""
    answers = os.fdopen(os.dup(1), "w")
    if sys.argv[2] == "megatron":
        prepare()
    else:
        for name in _OTHERS[sys.argv[2]]:
            importlib.import_module(name)
    if sys.argv[1].endswith(".py"):
        _run_script(sys.argv[1], "imported")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)  # nobody reads them from here on
    gc.collect()
    gc.freeze()  # or each rank's collections touch, and so copy, all that is shared
    print(_READY, end="", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        limit = asked.pop("limit")
        print(wait(start(**asked), limit).status, file=answers, flush=True)


def prepare() -> None:
    """Registers the plugin and imports what a run would import in each rank."""
    import megatron_s3

    megatron_s3.register("auto")
    for name in _NEEDED:
        with contextlib.suppress(ImportError):  # of another release
            importlib.import_module(name)


class Ended(NamedTuple):
    """How ranks ended.

    Attributes:
        status: the exit status of the first that failed, else 0; :data:`TIMED_OUT`.
        killed: those that had to be killed.
    """

    status: int
    killed: list[int]


def start(
    argv: Sequence[str], ranks: int, log: str | Path, program: str | Path = TRAINER
) -> list[int]:
    """Forks the ranks of a program from this process; returns their process ids."""
    return fork(lambda: run_program(str(program), argv), [log] * ranks)


def run_program(program: str, argv: Sequence[str]) -> None:
    """Runs a module, or a script where the name ends in ``.py``, as the main program."""
    sys.argv = [program, *argv]
    if program.endswith(".py"):
        _run_script(program, "__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def fork(function: Callable[[], object], logs: Sequence[str | Path]) -> list[int]:
    """Forks ranks that call a function and end.

    Args:
        function: is called with the environment that torchrun would give a rank.
        logs: for each rank the file to which it appends what it prints.

    Returns:
        Their process ids, each that of a group with all that the rank starts.
    """
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(len(logs)),
        "LOCAL_WORLD_SIZE": str(len(logs)),
    }
    return [_fork(function, rank, log) for rank, log in enumerate(logs)]


def first(pids: Iterable[int]) -> int:
    """Returns the first of several ranks to end, which :func:`wait` then reaps."""
    running = list(pids)
    while True:
        for pid in running:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return pid
        time.sleep(0.05)


def wait(
    pids: Sequence[int],
    limit: float = 0,
    grace: float = 0,
    watch: Callable[[], bool] | None = None,
) -> Ended:
    """Waits for the ranks of a run; none of them is left, nor what they started.

    Args:
        pids: of :func:`start` or :func:`fork`.
        limit: seconds after which all are killed; 0: none.
        grace: seconds after which the others are killed when one has failed.
        watch: called again and again until it returns True.
    """
    running, status, killed = set(pids), 0, []
    end = time.monotonic() + (limit or float("inf"))
    try:
        while running:
            for pid in sorted(running):
                ended, result = os.waitpid(pid, os.WNOHANG)
                if ended:
                    running.remove(pid)
                    kill(pid)  # what it has left behind
                    if result and not status:
                        status = os.waitstatus_to_exitcode(result)
                        end = min(end, time.monotonic() + grace)
            if running and time.monotonic() >= end:
                status = status or TIMED_OUT
                killed = sorted(running)
                break
            if running and watch is not None and watch():
                watch = None
            if running:
                time.sleep(0.0004 if watch else 0.005)
    finally:
        for pid in running:
            kill(pid)
            os.waitpid(pid, 0)
    return Ended(status, killed)


def kill(group: int, number: int = signal.SIGKILL) -> None:
    """Signals a rank and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _fork(function: Callable[[], object], rank: int, log: str | Path) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        lock.die_with_parent(parent)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        function()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            _end()
        finally:  # whatever happens: this process must not go on as the one that forked it
            os._exit(status)


def _end() -> None:
    """What an interpreter does at its end: Megatron's saving leaves a process behind until then."""
    for child in multiprocessing.active_children():
        child.kill()  # it may have inherited a handler of SIGTERM
        child.join()
    sys.stdout.flush()
    sys.stderr.flush()


def _run_script(path: str, name: str) -> None:
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    runpy.run_path(path, run_name=name)


if __name__ == "__main__":
    main()
