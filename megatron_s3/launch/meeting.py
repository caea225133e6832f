"""The nodes of a job, and their reports to the first node."""

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
        devices: number of GPUs that each node must have; 0 for the CPU.
        backends: the backends of torch.distributed that the ranks will use.
        timeout: seconds within which the slowest node must report, for each check.
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
        """Returns the store on the first node."""
        # torch exports it, but not in __all__.
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
    """Reports to the first node, and its results, through a store on that node."""

    def __init__(self, node: Node, store: "TCPStore") -> None:
        self.node, self.store = node, store
        self.slowest = ""
        self._gone: set[int] = set()

    def verdict(
        self,
        stage: str,
        check: Callable[[], str | None],
        also: Callable[[], dict[str, str]] = dict,
    ) -> dict[int, str]:
        """Checks this node and reports the result; returns a line for each bad node.

        Args:
            stage: a name that is the same on all nodes.
            check: returns the problem of this node; None if there is none.
            also: is called on the first node when all have reported; returns problems by node name.

        Returns:
            Lines by rank; empty if all nodes are good.
        """
        node = self.node
        key = f"{stage}/verdict"
        started = time.monotonic()
        report = {"problem": check(), "seconds": time.monotonic() - started}
        self.store.set(f"{stage}/{node.rank}", json.dumps(report))
        if node.rank:
            # The first node may wait for the full timeout for each of the others, and then for this
            # one.
            self.store.wait([key], timedelta(seconds=2 * node.timeout + 30))
            lines = json.loads(self.store.get(key))
            return {int(rank): line for rank, line in lines.items()}
        lines, took = {}, {}
        # The others end their own checks within the timeout, and report why.
        deadline = started + 1.2 * node.timeout + 1
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
        self.slowest = f"{took[slowest]} was the slowest ({slowest:.1f} s)"
        self.store.set(key, json.dumps(lines))
        return lines

    def leave(self) -> None:
        """Keeps the store open until all nodes have read the last result."""
        self.store.set(f"left/{self.node.rank}", "")
        if self.node.rank == 0:
            left = [f"left/{r}" for r in range(len(self.node.names)) if r not in self._gone]
            with contextlib.suppress(Exception):
                self.store.wait(left, timedelta(seconds=10))
