"""Search for the faulty node, given which pairs of nodes can communicate."""

from collections.abc import Iterable

__all__ = ["blame", "rounds"]


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Returns neighbouring pairs in a ring, in rounds; the pairs of a round are disjoint.

    Args:
        nodes: number of nodes, at least 2.
    """
    ring = [(i, (i + 1) % nodes) for i in range(nodes if nodes > 2 else 1)]
    even, odd = ring[0 : nodes - 1 : 2], ring[1 : nodes - 1 : 2]
    # Shares a node with the first pair, and in an odd ring with the even pairs.
    last = ring[nodes - 1 :]
    if nodes % 2 == 0:
        odd, last = odd + last, []
    return [pairs for pairs in (even, odd, last) if pairs]


def blame(names: list[str], failed: Iterable[tuple[int, int]]) -> dict[int, str]:
    """Returns which nodes are faulty, given the pairs that cannot communicate.

    Args:
        names: host names, by rank.
        failed: the pairs of :func:`rounds` between which an all-reduce fails.

    Returns:
        Lines by rank: one for each node that reaches none of its neighbours, and one for the first
        node of each pair that this does not explain.
    """
    count: dict[int, int] = {}
    failed = list(failed)
    for pair in failed:
        for rank in pair:
            count[rank] = count.get(rank, 0) + 1
    lines = {
        rank: f"{names[rank]}: no all-reduce with any other node"
        for rank, times in sorted(count.items())
        if times == 2
    }
    for one, other in failed:
        if one not in lines and other not in lines:
            lines[one] = f"{names[one]} and {names[other]}: no all-reduce between the two"
    return lines
