"""The quickstart's model on one rank, for experiments that train it otherwise."""

from megatron_s3 import quickstart
from megatron_s3.launch.config import load

__all__ = ["words"]


def words(name: str, iters: int, *sets: str) -> list[str]:
    """Returns Megatron's flags of a run of the quickstart, without any path.

    Args:
        name: of one of :data:`megatron_s3.quickstart.RUNS`.
        iters: length of the run.
        *sets: what else is set, as ``KEY=VALUE``.
    """
    given = [*quickstart.settings(iters, nproc=1), *sets]
    return load([quickstart.RUNS[name]], given).words()
