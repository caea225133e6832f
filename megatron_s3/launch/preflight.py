"""Looks at every node of a SLURM job before anything trains, and names the bad ones.

``srun --ntasks-per-node=1 python -m megatron_s3.launch.preflight CONFIG [OVERLAY ...] --nodes
NAME,NAME`` runs this once on each node of a job. It looks at

1. the disk: the run directory can be written, is the same on all nodes, and has room; and the
   devices: as many as the configuration wants ranks, and each computes correctly;
2. the network: an all-reduce over all devices of all nodes, with NCCL for GPUs, and with gloo, of
   which Megatron makes groups too. Where that fails, all-reduces within pairs of nodes tell which
   node is to blame, and the reasons are printed.

All of it in the environment that the ranks will have (``launch.environment``).

Nodes report to the first one, at MASTER_ADDR:MASTER_PORT, which is where training will meet too. A
node that does not report in time is bad as well: that a node is slow is judged by nothing but the
time limit, since what is slow for one machine is not for another; the slowest is named when all is
well.

Exit status: 0, all is well; 1, some node is bad, and a line each says which and why; 2, cannot run.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_s3.launch.blame import blame, rounds

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from megatron_s3.launch.config import Config

__all__ = ["main"]

_GIB = 2**30


@dataclass
class _Node:
    """This node and the others of the job.

    Attributes:
        rank: 0 for the node that collects the reports.
        names: host names of all nodes, by rank.
        address: TCP address of the first node, as NAME:PORT.
        devices: number of GPUs that every node has to have; 0 for the CPU.
        backends: of torch.distributed, which the ranks will use.
        timeout: seconds within which the slowest node has to report, for each look.
    """

    rank: int
    names: list[str]
    address: str
    devices: int
    backends: tuple[str, ...]
    timeout: float

    @property
    def name(self) -> str:
        return self.names[self.rank]

    def connect(self, first: bool = False) -> "TCPStore":
        from torch.distributed import TCPStore

        host, _, port = self.address.rpartition(":")
        return TCPStore(
            host,
            int(port),
            is_master=first,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.timeout),
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the preflight on this node; see the module."""
    from megatron_s3.launch.check import environment
    from megatron_s3.launch.config import ConfigError
    from megatron_s3.launch.selection import add_config_arguments, add_run_arguments, resolve

    parser = argparse.ArgumentParser(
        prog="python -m megatron_s3.launch.preflight",
        description="Check the disk, the devices and the network of every node of a SLURM job.",
    )
    add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument("--nodes", required=True, help="host names by SLURM_NODEID, with commas")
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds for each look (default: 300)"
    )
    parser.add_argument(
        "--min-free", type=float, default=0, help="GiB of room in the run directory (default: 0)"
    )
    args = parser.parse_args(argv)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
        signal.signal(number, signal.SIG_IGN)  # the job's time is up: it is for the trainer
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else pages of stack frames
    try:
        config, run_dir = resolve(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with environment(config):
        return _preflight(args, config, run_dir)


def _preflight(args: argparse.Namespace, config: "Config", run_dir: Path) -> int:
    """Looks at this node and the others in the ranks' environment; returns the exit status."""
    from megatron_s3.launch.config import ConfigError
    from megatron_s3.launch.progress import progress, save_folder

    try:
        so_far = progress(config, run_dir)
        devices = _devices(config.arguments.get("s3_device"), config.launch.nproc_per_node)
        node = _Node(
            rank=int(os.environ["SLURM_NODEID"]),
            names=args.nodes.split(","),
            address=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            devices=devices,
            backends=_backends(devices, bool(config.arguments.get("disable_gloo_process_groups"))),
            timeout=args.timeout,
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"error: {error.args[0]} is not set: run this in a SLURM step", file=sys.stderr)
        return 2
    if so_far.finished:
        _say(node, f"trained to iteration {so_far.last} already, so no node is looked at")
        return 0
    # Children are forked before any thread of torch's works or holds a lock.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    folders = [run_dir]
    if "save" in config.arguments:
        folders.append(save_folder(config, run_dir))
    return _look(node, folders, args.min_free)


def _backends(devices: int, without_gloo: bool) -> tuple[str, ...]:
    """Returns what the ranks' process groups are of."""
    if not devices:
        return ("gloo",)
    return ("nccl",) if without_gloo else ("nccl", "gloo")


def _devices(s3_device: object, per_node: int) -> int:
    """How many GPUs a node needs, as the adapter's --s3-device decides it."""
    import torch

    if s3_device == "cpu" or (s3_device in (None, "auto") and not torch.cuda.is_available()):
        return 0
    return per_node


def _look(node: _Node, folders: Sequence[Path], min_free: float) -> int:
    started = time.monotonic()
    try:
        store = node.connect(first=node.rank == 0)
    except Exception as error:  # torch raises several kinds
        what = f"cannot reach {node.address} within {node.timeout:g} s: {_first_line(error)}"
        if node.rank == 0:
            what = f"cannot listen at {node.address}: {_first_line(error)}"
        print(f"preflight: {node.name}: {what}", file=sys.stderr, flush=True)
        return 1
    try:
        meeting = _Meeting(node, store)
        disks = [_disk(folder, node.name, min_free) for folder in folders]
        own = "; ".join(filter(None, [*disks, _computes(node)])) or None
        seen = partial(_not_shared, folders, node.names)
        bad = meeting.verdict("own", own, started, also=seen)
        for folder in folders:
            with contextlib.suppress(OSError):
                _mark(folder, node.name).unlink(missing_ok=True)
        if not bad and len(node.names) * max(node.devices, 1) > 1:
            everyone = range(len(node.names))
            started = time.monotonic()
            problem = _all_reduce(node, "all", everyone)
            reasons = meeting.verdict("all", problem, started)
            if reasons:
                bad = _ask_pairs(node, meeting, reasons)
        if not bad:
            device = f"{node.devices} GPUs each" if node.devices else "on CPUs"
            _say(node, f"{len(node.names)} nodes, {device}: all well; {meeting.slowest}")
        for line in bad.values():
            _say(node, line)
        meeting.leave()
    except Exception as error:
        what = f"lost {node.address}: {_first_line(error)}"
        print(f"preflight: {node.name}: {what}", file=sys.stderr, flush=True)
        return 1
    return 1 if bad else 0


class _Meeting:
    """Reports to the first node, and its verdicts, through a store there."""

    def __init__(self, node: _Node, store: "TCPStore") -> None:
        self.node, self.store = node, store
        self.slowest = ""
        self._gone: set[int] = set()

    def verdict(
        self,
        stage: str,
        problem: str | None,
        started: float,
        also: Callable[[], dict[str, str]] = dict,
    ) -> dict[int | str, str]:
        """Reports this node's problem, if any, and returns the lines about all bad nodes.

        Args:
            stage: any name, the same on all nodes.
            problem: what is wrong with this node.
            started: when this node's look began, by the monotonic clock.
            also: called on the first node when all have reported; problems by node name.

        Returns:
            Lines by rank; empty if all is well.
        """
        node = self.node
        key = f"{stage}/verdict"
        report = {"problem": problem, "seconds": time.monotonic() - started}
        self.store.set(f"{stage}/{node.rank}", json.dumps(report))
        if node.rank:
            # The first node waits as long as it may for each of the others, and then for us.
            self.store.wait([key], timedelta(seconds=2 * node.timeout + 30))
            lines = json.loads(self.store.get(key))
            return {int(rank): line for rank, line in lines.items()}
        lines, took = {}, {}
        deadline = started + 1.2 * node.timeout + 1  # they end their own looks in time, and say why
        for rank, name in enumerate(node.names):
            try:
                left = max(deadline - time.monotonic(), 0.1)
                self.store.wait([f"{stage}/{rank}"], timedelta(seconds=left))
                report = json.loads(self.store.get(f"{stage}/{rank}"))
            except Exception:
                self._gone.add(rank)
                lines[rank] = f"{name}: did not report within {node.timeout:g} s"
                continue
            took[report["seconds"]] = name
            if report["problem"]:
                lines[rank] = f"{name}: {report['problem']}"
        for name, what in also().items():
            lines.setdefault(node.names.index(name), f"{name}: {what}")
        slowest = max(took)
        self.slowest = f"{took[slowest]} was the slowest, {slowest:.1f} s"
        self.store.set(key, json.dumps(lines))
        return lines

    def leave(self) -> None:
        """Keeps the store open until all have read the last verdict."""
        self.store.set(f"left/{self.node.rank}", "")
        if self.node.rank == 0:
            left = [f"left/{r}" for r in range(len(self.node.names)) if r not in self._gone]
            with contextlib.suppress(Exception):
                self.store.wait(left, timedelta(seconds=10))


def _mark(run_dir: Path, name: str) -> Path:
    return run_dir / f".preflight-{name}"


def _disk(run_dir: Path, name: str, min_free: float) -> str | None:
    data = os.urandom(2**20)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(_mark(run_dir, name), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if _mark(run_dir, name).read_bytes() != data:
            return f"{run_dir} does not give back what is written to it"
        free = shutil.disk_usage(run_dir).free / _GIB
    except OSError as error:
        return f"cannot write to {run_dir}: {error.strerror}"
    if free < min_free:
        return f"{run_dir} has {free:.1f} GiB free, and {min_free:g} are asked for"
    return None


def _not_shared(folders: Iterable[Path], names: Iterable[str]) -> dict[str, str]:
    """Nodes whose files this node does not see."""
    names = list(names)
    return {
        name: f"{folder} is another disk there than on the first node; it has to be shared"
        for folder in folders
        for name in names
        if not _mark(folder, name).exists()
    }


def _computes(node: _Node) -> str | None:
    return _in_children(node, 1, _multiply, node.devices)


def _multiply(_: int, devices: int) -> str | None:
    """Multiplies matrices of ones on every device: the result is exact in any precision."""
    import torch

    if devices and torch.cuda.device_count() < devices:
        return (
            f"has {torch.cuda.device_count()} GPUs, and the configuration wants {devices} "
            "(launch.nproc_per_node)"
        )
    for index in range(max(devices, 1)):
        device = torch.device("cuda", index) if devices else torch.device("cpu")
        side = 1024 if devices else 128  # a busy CPU takes seconds for more
        try:
            ones = torch.ones(side, side, dtype=torch.bfloat16, device=device)
            right = bool(((ones @ ones) == side).all())
        except RuntimeError as error:
            return f"{device} fails: {_first_line(error)}"
        if not right:
            return f"{device} multiplies wrongly"
    return None


def _all_reduce(node: _Node, stage: str, ranks: Iterable[int]) -> str | None:
    """An all-reduce over the devices of some nodes, this one among them."""
    return _in_children(node, max(node.devices, 1), _reduce_one, node, stage, list(ranks))


def _reduce_one(index: int, node: _Node, stage: str, ranks: list[int]) -> str | None:
    """One device's part of the all-reduce."""
    import torch
    import torch.distributed as dist

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
                store=dist.PrefixStore(f"{stage}/{number}", node.connect()),
                rank=ranks.index(node.rank) * each + index,
                world_size=world,
                timeout=timedelta(seconds=0.8 * node.timeout),
            )
            numbers = torch.ones(2**22, device=where)
            dist.all_reduce(numbers)
            right = bool((numbers == world).all())
            dist.destroy_process_group()
        except Exception as error:  # torch raises several kinds
            return f"no all-reduce with {backend}: {_first_line(error)}"
        if not right:
            return f"the all-reduce with {backend} gives a wrong sum on {where}"
    return None


def _in_children(node: _Node, count: int, task: Callable, *args) -> str | None:
    """Runs a task in processes that can be ended should a driver or the network hang.

    Args:
        node: gives the time limit.
        count: number of processes.
        task: called with the number of the process and ``args``; returns a problem or None.
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
            problems.append(f"the check itself ended with status {child.exitcode}")
    for child, _ in children:
        child.kill()
        child.join()
    return "; ".join(dict.fromkeys(filter(None, problems))) or None


def _report(pipe: Connection, task: Callable, *args) -> None:
    pipe.send(task(*args))


def _ask_pairs(
    node: _Node, meeting: _Meeting, reasons: dict[int | str, str]
) -> dict[int | str, str]:
    """The lines that name who is to blame, then what each node has said."""
    failed, said = [], list(reasons.values())
    for number, pairs in enumerate(rounds(len(node.names))):
        mine = next((pair for pair in pairs if node.rank in pair), None)
        started = time.monotonic()
        problem = _all_reduce(node, f"pairs/{number}", mine) if mine else None
        bad = meeting.verdict(f"pair/{number}", problem, started)
        failed += [pair for pair in pairs if set(pair) & bad.keys()]
        said += bad.values()
    whole = "all nodes: the all-reduce over all of them fails, though not within pairs"
    lines: dict[int | str, str] = {**blame(node.names, failed)} or {0: whole}
    return lines | {f"reason {n}": f"  {line}" for n, line in enumerate(dict.fromkeys(said))}


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]


def _say(node: _Node, line: str) -> None:
    if node.rank == 0:
        print(f"preflight: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
