"""The node that speaks for a job."""

import os

__all__ = ["first_node"]


def first_node() -> bool:
    """Returns whether this node is the one that speaks for all nodes of a job."""
    return os.environ.get("SLURM_NODEID", "0") == "0"
