"""The nodes of a job, and how they report to the first of them."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

__all__ = ["Meeting", "Node"]


@dataclass
class Node:
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
        """Returns this node's host name."""
        return self.names[self.rank]

    def connect(self, first: bool = False) -> "TCPStore":
        """Returns the store that the first node keeps."""
        # torch exports it without listing it.
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host, _, port = self.address.rpartition(":")
        return TCPStore(
            host,
            int(port),
            is_master=first,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.timeout),
        )


class Meeting:
    """Reports to the first node, and its verdicts, through a store there."""

    def __init__(self, node: Node, store: "TCPStore") -> None:
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
