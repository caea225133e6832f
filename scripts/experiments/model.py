"""The quickstart's model on one rank, for experiments with other settings."""

from megatron_s3 import quickstart
from megatron_s3.launch.config import load

__all__ = ["words"]


def words(name: str, iters: int, *sets: str) -> list[str]:
    """Returns Megatron's flags of a run of the quickstart, without paths.

    Args:
        name: a key of :data:`megatron_s3.quickstart.RUNS`.
        iters: number of iterations.
        *sets: other settings, as ``KEY=VALUE``.
    """
    given = [*quickstart.settings(iters, nproc=1), *sets]
    return load([quickstart.RUNS[name]], given).words()
