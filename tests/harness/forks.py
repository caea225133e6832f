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
import traceback
from collections.abc import Sequence
from pathlib import Path

from megatron_s3.launch import lock
from tests.harness.ports import free_port

__all__ = ["TIMED_OUT", "TRAINER", "Forks", "import_needed", "start"]

TRAINER = "megatron_s3.pretrain_gpt"
#: What :meth:`Forks.run` returns for ranks that were stopped at their limit, as timeout(1) does.
TIMED_OUT = 124

#: What a training run imports besides, and takes seconds.
_NEEDED = (
    "megatron.core.tokenizers.text",  # transformers
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.models.mimo",
)

_READY = "ready to fork\n"
_REPOSITORY = Path(__file__).resolve().parents[2]


class Forks:
    """A process that has imported Megatron, with the plugin registered.

    It ends with the process that made it.

    Args:
        megatron: folder that holds the ``megatron`` to import; the installed one if None.
        program: what the ranks run, a module's name or a script's path. A script is imported
            beforehand.

    Raises:
        RuntimeError: it cannot be imported; with the traceback.
    """

    def __init__(self, megatron: str | Path | None = None, program: str | Path = TRAINER) -> None:
        self._program = str(program)
        path = [str(p) for p in (megatron, _REPOSITORY, os.environ.get("PYTHONPATH")) if p]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self._program],
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
        limit: int = 0,
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
    import megatron_s3

    megatron_s3.register()
    import_needed()
    if sys.argv[1].endswith(".py"):
        _run_script(sys.argv[1], "imported")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)  # nobody reads them from here on
    gc.collect()
    gc.freeze()  # or each rank's collections touch, and so copy, all that is shared
    print(_READY, end="", file=answers, flush=True)
    for line in sys.stdin:
        print(_run(**json.loads(line)), file=answers, flush=True)


def import_needed() -> None:
    """Imports what a run would import in each rank."""
    for name in _NEEDED:
        with contextlib.suppress(ImportError):  # of another release
            importlib.import_module(name)


def _run(argv: list[str], ranks: int, log: str, program: str, limit: int) -> int:
    running = set(start(argv, ranks, log, program))
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(limit)
    try:
        while running:
            pid, result = os.wait()
            if pid in running:
                running.remove(pid)
                _kill(pid)  # what it has left behind
                if result:
                    return os.waitstatus_to_exitcode(result)
        return 0
    except TimeoutError:
        return TIMED_OUT
    finally:
        signal.alarm(0)
        for pid in running:
            _kill(pid)
            os.waitpid(pid, 0)


def start(argv: list[str], ranks: int, log: str, program: str = TRAINER) -> list[int]:
    """Forks the ranks of a run from this process; their process ids, each that of a group."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    return [_start(rank, argv, log, program) for rank in range(ranks)]


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _too_late(number: int, frame: object) -> None:
    raise TimeoutError


def _start(rank: int, argv: list[str], log: str, program: str) -> int:
    """Forks a rank, the first of a process group with whatever it starts; its process id."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        lock.die_with_parent()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [program, *argv]
        if program.endswith(".py"):
            _run_script(program, "__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
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
