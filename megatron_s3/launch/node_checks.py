"""Checks of a node: its disk, its devices' arithmetic, and its network."""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_s3.launch.meeting import Node

__all__ = ["all_reduce", "computes", "disk", "first_line", "mark", "not_shared"]


_GIB = 2**30


def mark(run_dir: Path, name: str) -> Path:
    """Returns the file that shows whether a node shares a folder with the others."""
    return run_dir / f".preflight-{name}"


def disk(run_dir: Path, name: str, min_free: float) -> str | None:
    """Returns the problem of a folder on this node, if any, and writes the node's mark into it."""
    data = os.urandom(2**20)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(mark(run_dir, name), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mark(run_dir, name).read_bytes() != data:
            return f"{run_dir}: the file read back differs from the file written"
        free = shutil.disk_usage(run_dir).free / _GIB
    except OSError as error:
        return f"cannot write to {run_dir}: {error.strerror}"
    if free < min_free:
        return f"{run_dir} has {free:.1f} GiB free, and MIN_FREE_GIB asks for {min_free:g}"
    return None


def not_shared(folders: Iterable[Path], names: Sequence[str]) -> dict[str, str]:
    """Returns the nodes whose marks the first one does not see, where it sees its own."""
    return {
        name: f"{folder} is not the same disk as on the first node; it must be shared"
        for folder in folders
        if os.path.exists(mark(folder, names[0]))
        for name in names
        if not os.path.exists(mark(folder, name))
    }


def computes(node: Node) -> str | None:
    """Returns which device multiplies incorrectly or fails; None if all are good."""
    return _in_children(node, 1, _multiply, node.devices)


def _multiply(_: int, devices: int) -> str | None:
    """Multiplies matrices of ones on each device; the result is exact in any precision."""
    import torch

    if devices and torch.cuda.device_count() < devices:
        return (
            f"has {torch.cuda.device_count()} GPUs, and the configuration needs {devices} "
            "(launch.nproc_per_node)"
        )
    for index in range(max(devices, 1)):
        device = torch.device("cuda", index) if devices else torch.device("cpu")
        side = 1024 if devices else 128  # a busy CPU needs seconds for larger ones
        try:
            ones = torch.ones(side, side, dtype=torch.bfloat16, device=device)
            right = bool(((ones @ ones) == side).all())
        except RuntimeError as error:
            return f"{device} fails: {first_line(error)}"
        if not right:
            return f"{device} gives a wrong product of matrices"
    return None


def all_reduce(node: Node, stage: str, ranks: Iterable[int]) -> str | None:
    """Runs an all-reduce over the devices of some nodes, including this one."""
    return _in_children(node, max(node.devices, 1), _reduce_one, node, stage, list(ranks))


def _reduce_one(index: int, node: Node, stage: str, ranks: list[int]) -> str | None:
    """Runs the part of one device in the all-reduce."""
    import torch
    import torch.distributed as dist

    # torch exports it, but not in __all__.
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    each = max(node.devices, 1)
    world = len(ranks) * each
    device = torch.device("cuda", index) if node.devices else torch.device("cpu")
    if node.devices:
        torch.cuda.set_device(device)
    for number, backend in enumerate(node.backends):
        where = device if backend == "nccl" else torch.device("cpu")
        try:
            dist.init_process_group(
                backend,
                store=PrefixStore(f"{stage}/{number}", node.connect()),
                rank=ranks.index(node.rank) * each + index,
                world_size=world,
                timeout=timedelta(seconds=0.8 * node.timeout),
            )
            numbers = torch.ones(2**22, device=where)
            dist.all_reduce(numbers)
            right = bool((numbers == world).all())
            dist.destroy_process_group()
        except Exception as error:  # torch raises several types
            return f"the all-reduce with {backend} fails: {first_line(error)}"
        if not right:
            return f"the all-reduce with {backend} gives a wrong sum on {where}"
    return None


def _in_children(
    node: Node, count: int, task: Callable[..., str | None], *args: object
) -> str | None:
    """Runs a task in processes that can be killed if a driver or the network hangs.

    Args:
        node: provides the time limit.
        count: number of processes.
        task: is called with the number of the process and ``args``; returns a problem or None.
    """
    fork = multiprocessing.get_context("fork")
    children, problems = [], []
    for index in range(count):
        here, there = fork.Pipe(duplex=False)
        child = fork.Process(target=_report, args=(there, task, index, *args), daemon=True)
        child.start()
        there.close()
        children.append((child, here))
    deadline = time.monotonic() + node.timeout
    for child, pipe in children:
        if not pipe.poll(max(deadline - time.monotonic(), 0)):
            problems.append(f"no answer within {node.timeout:g} s")
            continue
        try:
            problems.append(pipe.recv())
        except EOFError:
            child.join(5)
            problems.append(f"the process of the check ended with status {child.exitcode}")
    for child, _ in children:
        child.kill()
        child.join()
    return "; ".join(dict.fromkeys(filter(None, problems))) or None


def _report(pipe: Connection, task: Callable[..., str | None], *args: object) -> None:
    pipe.send(task(*args))


def first_line(error: BaseException) -> str:
    """Returns an error's message in one line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]
