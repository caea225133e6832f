"""Starts ranks from a process that has imported torch and Megatron already.

Importing them takes ten times as long as the training that most tests do. A rank is a fork of this
process: a process of its own with its own process group, argv and environment, as torchrun's are
(torchrun itself runs in tests/launch, tests/cluster and tests/mcore/ranks).

Reads requests from standard input, one JSON object a line: ``argv`` of the training module,
``ranks``, ``environment``, ``log``, the file for what the ranks print. Answers each with the exit
status on a line.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import traceback

MODULE = "megatron_s3.pretrain_gpt"


def main() -> None:
    import megatron_s3

    megatron_s3.register()
    for line in sys.stdin:
        request = json.loads(line)
        print(run(**request), flush=True)


def run(argv: list[str], ranks: int, environment: dict[str, str], log: str) -> int:
    """Forks the ranks and waits for them; when one fails the others are killed, as by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    running = {start(rank, argv, environment, log) for rank in range(ranks)}
    status = 0
    while running:
        pid, result = os.wait()
        if pid not in running:
            continue
        running.remove(pid)
        if result and not status:
            status = os.waitstatus_to_exitcode(result)
            for other in running:
                os.kill(other, signal.SIGKILL)
    return status


def start(rank: int, argv: list[str], environment: dict[str, str], log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [MODULE, *argv]
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # What an interpreter does at its end: Megatron's saving leaves a process behind until then.
        for child in multiprocessing.active_children():
            child.kill()  # it may have inherited a handler of SIGTERM
            child.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
