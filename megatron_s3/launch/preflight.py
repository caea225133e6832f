"""Checks each node of a SLURM job before training, and names the bad ones.

``srun --ntasks-per-node=1 python -m megatron_s3.launch.preflight CONFIG [OVERLAY ...] --nodes
NAME,NAME`` runs this module once on each node of a job. It checks

1. the disk: the run folder can be written, is the same on all nodes, and has room; and the
   devices: as many as the configuration wants ranks, and each computes correctly;
2. the network: an all-reduce over all devices of all nodes, with NCCL for GPUs, and with gloo, of
   which Megatron makes groups too. Where that fails, all-reduces within pairs of nodes tell which
   node is to blame, and the reasons are printed.

All checks run in the environment of the ranks (``launch.environment``).

Nodes report to the first node at MASTER_ADDR:MASTER_PORT, which is also the rendezvous of the
training. A node that does not report in time is bad too. Only the time limit decides whether a node
is too slow, because speeds differ between machines; if all nodes are good, the slowest is named.

Exit status: 0, all nodes are good; 1, a node is bad, and a line for each bad node gives the reason;
2, the preflight cannot run.
"""

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_s3.launch.blame import blame, rounds
from megatron_s3.launch.check import environment
from megatron_s3.launch.config import Config, ConfigError
from megatron_s3.launch.meeting import Meeting, Node
from megatron_s3.launch.node_checks import all_reduce, computes, disk, first_line, mark, not_shared
from megatron_s3.launch.progress import progress, save_folder
from megatron_s3.launch.selection import add_config_arguments, add_run_arguments, resolve
from megatron_s3.launch.stopping import FOR_THE_LAUNCHER

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Runs the preflight on this node; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_s3.launch.preflight",
        description="Check disk, devices and network of each node of a SLURM job.",
    )
    add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument(
        "--nodes",
        required=True,
        help="host names in the order of SLURM_NODEID, separated by commas",
    )
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds for each check (default: 300)"
    )
    parser.add_argument(
        "--min-free",
        type=float,
        default=0,
        help="free space in the run folder, GiB (default: 0)",
    )
    args = parser.parse_intermixed_args(argv)
    for number in FOR_THE_LAUNCHER:
        signal.signal(number, signal.SIG_IGN)  # the trainer handles a time limit
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # avoids pages of stack frames
    try:
        config, run_dir = resolve(args)
        with environment(config):
            return _preflight(args, config, run_dir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _preflight(args: argparse.Namespace, config: Config, run_dir: Path) -> int:
    """Checks this node and the others in the ranks' environment; returns the exit status."""
    so_far = progress(config, run_dir)
    try:
        devices = _devices(config.arguments.get("plugin_device"), config.launch.nproc_per_node)
        node = Node(
            rank=int(os.environ["SLURM_NODEID"]),
            names=args.nodes.split(","),
            address=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            devices=devices,
            backends=_backends(devices, bool(config.arguments.get("disable_gloo_process_groups"))),
            timeout=args.timeout,
        )
    except KeyError as error:
        print(
            f"error: {error.args[0]} is not set; run this module in a SLURM step", file=sys.stderr
        )
        return 2
    if so_far.finished:
        _say(
            node,
            f"training is already finished (iteration {so_far.last}); the nodes are not checked",
        )
        return 0
    # Children are forked before a thread of torch runs or holds a lock.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    folders = [run_dir]
    if "save" in config.arguments:
        folders.append(save_folder(config, run_dir))
    return _look(node, folders, args.min_free)


def _backends(devices: int, without_gloo: bool) -> tuple[str, ...]:
    """Returns the backends of the ranks' process groups."""
    if not devices:
        return ("gloo",)
    return ("nccl",) if without_gloo else ("nccl", "gloo")


def _devices(plugin_device: object, per_node: int) -> int:
    """Returns how many GPUs a node needs, by the same rule as --plugin-device."""
    import torch

    if plugin_device == "cpu" or (
        plugin_device in (None, "auto") and not torch.cuda.is_available()
    ):
        return 0
    return per_node


def _look(node: Node, folders: Sequence[Path], min_free: float) -> int:
    try:
        store = node.connect(first=node.rank == 0)
    except Exception as error:  # torch raises several types
        what = f"cannot reach {node.address} within {node.timeout:g} s: {first_line(error)}"
        if node.rank == 0:
            what = f"cannot listen at {node.address}: {first_line(error)}"
        print(f"preflight: {node.name}: {what}", file=sys.stderr, flush=True)
        return 1

    def own() -> str | None:
        disks = [disk(folder, node.name, min_free) for folder in folders]
        return "; ".join(filter(None, [*disks, computes(node)])) or None

    try:
        meeting = Meeting(node, store)
        seen = partial(not_shared, folders, node.names)
        bad = [*meeting.verdict("own", own, also=seen).values()]
        for folder in folders:
            with contextlib.suppress(OSError):
                mark(folder, node.name).unlink(missing_ok=True)
        if not bad and len(node.names) * max(node.devices, 1) > 1:
            bad = _network(node, meeting)
        if not bad:
            device = f"{node.devices} GPUs each" if node.devices else "on CPUs"
            _say(node, f"{len(node.names)} nodes, {device}: all checks passed; {meeting.slowest}")
        for line in bad:
            _say(node, line)
        meeting.leave()
    except Exception as error:
        what = f"lost the connection to {node.address}: {first_line(error)}"
        print(f"preflight: {node.name}: {what}", file=sys.stderr, flush=True)
        return 1
    return 1 if bad else 0


def _network(node: Node, meeting: Meeting) -> list[str]:
    """Returns the lines that name the bad nodes, then their reasons; none if all work."""
    everyone = range(len(node.names))
    said = [*meeting.verdict("all", lambda: all_reduce(node, "all", everyone)).values()]
    if not said or len(everyone) == 1:
        return said
    failed: list[tuple[int, int]] = []
    for number, pairs in enumerate(rounds(len(everyone))):
        mine = next((pair for pair in pairs if node.rank in pair), ())
        check = partial(all_reduce, node, f"pairs/{number}", mine) if mine else lambda: None
        bad = meeting.verdict(f"pair/{number}", check)
        failed += [pair for pair in pairs if set(pair) & bad.keys()]
        said += bad.values()
    whole = "all nodes: the all-reduce over all nodes fails, but those of pairs of nodes succeed"
    lines = [*blame(node.names, failed).values()] or [whole]
    return [*lines, *(f"  {reason}" for reason in dict.fromkeys(said))]


def _say(node: Node, line: str) -> None:
    if node.rank == 0:
        print(f"preflight: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
