"""Search for the faulty node, given which pairs of nodes can communicate."""

from collections import Counter
from collections.abc import Sequence

__all__ = ["blame", "rounds"]


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Returns neighbouring pairs in a ring, in rounds; the pairs of a round are disjoint.

    Args:
        nodes: number of nodes, at least 2.
    """
    ring = [(i, (i + 1) % nodes) for i in range(nodes if nodes > 2 else 1)]
    # The last pair of an odd ring shares its nodes with the first pair and the one before it.
    apart = nodes - nodes % 2
    return [pairs for pairs in (ring[0:apart:2], ring[1:apart:2], ring[apart:]) if pairs]


def blame(names: list[str], failed: Sequence[tuple[int, int]]) -> dict[int, str]:
    """Returns which nodes are faulty, given the pairs that cannot communicate.

    Args:
        names: host names, by rank.
        failed: the pairs of :func:`rounds` between which an all-reduce fails.

    Returns:
        Lines by rank: one for each node that reaches none of its neighbours, and one for the first
        node of each pair that this does not explain.
    """
    count = Counter(rank for pair in failed for rank in pair)
    lines = {
        rank: f"{names[rank]}: no all-reduce with any other node"
        for rank in sorted(count)
        if count[rank] == 2
    }
    for one, other in failed:
        if one not in lines and other not in lines:
            lines[one] = f"{names[one]} and {names[other]}: no all-reduce between the two"
    return lines
