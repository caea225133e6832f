"""Long runs: sizes of the small GPT, tokens a parameter, optimizers, and what they cost.

At the shortest length each optimizer's learning rate is searched as in the suite.  At a longer one
the search begins around the best rate of the length before, whose seeds are trained first.  The
rate is chosen on validation documents; the loss that is reported is that of other documents.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from scripts.experiments.suite import FIRST, MOST, SEARCHES, SEEDS, Run, best, search

__all__ = ["LENGTHS", "OPTIMIZERS", "SIZES", "Size", "cost", "plan"]

#: Tokens of an iteration: 16 samples of 64 bytes.
TOKENS = 1024
#: Tokens a parameter.
LENGTHS = (20, 100)
_OF = SEARCHES["optimizers"]
#: By label: the optimizer's flags, and the middle learning rate of its search at the first length.
OPTIMIZERS: dict[str, tuple[str, float]] = {
    "S3": _OF["S3"],
    "S3, ramp, bound 5": ("--optimizer s3 --s3-beta-ramp --s3-grad-bound 5", _OF["S3"][1]),
    "AdamW": _OF["AdamW"],
    "NAdam": _OF["NAdam"],
    "S3, ramp": ("--optimizer s3 --s3-beta-ramp", _OF["S3"][1]),
    "Adan": _OF["Adan"],
    "Lion": _OF["Lion"],
}


@dataclass(frozen=True)
class Size:
    """A model of the suite.

    Attributes:
        name: its name, such as "0.12M".
        flags: Megatron's flags of its shape.
        parameters: number of its parameters.
        seconds: seconds of an iteration on one core of the machine of the results.
    """

    name: str
    flags: str
    parameters: int
    seconds: float

    def iterations(self, tokens: float) -> int:
        """Returns the iterations of so many tokens a parameter."""
        return round(tokens * self.parameters / TOKENS)


def _size(name: str, layers: int, hidden: int, seconds: float) -> Size:
    # A layer; the last norm; 272 tokens (257, made divisible by 16) and 64 positions.
    parameters = layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden + (272 + 64) * hidden
    flags = f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads 4"
    return Size(name, flags, parameters, seconds)


SIZES = {
    size.name: size
    for size in (
        _size("0.12M", 2, 64, 0.037),
        _size("0.8M", 4, 128, 0.12),
        _size("3M", 6, 200, 0.32),
    )
}


def plan(
    results: Mapping[str, float],
    sizes: Sequence[Size],
    lengths: Sequence[float] = LENGTHS,
    labels: Sequence[str] | None = None,
) -> list[Run]:
    """Returns the runs that can be planned from the present results, including finished ones.

    Args:
        results: final validation loss by :attr:`Run.key`.
        sizes: models.
        lengths: tokens a parameter.
        labels: labels of :data:`OPTIMIZERS`; all if None.
    """
    of = [label for label in OPTIMIZERS if labels is None or label in labels]
    return [run for size in sizes for run in _of_size(size, sorted(set(lengths)), of, results)]


def _of_size(
    size: Size, lengths: Sequence[float], labels: Sequence[str], results: Mapping[str, float]
) -> Iterator[Run]:
    middles: dict[str, float] = {label: OPTIMIZERS[label][1] for label in labels}
    for at, tokens in enumerate(lengths):
        searches = {}
        if at:
            for seed in SEEDS:
                yield from (_run(size, tokens, label, lr, seed) for label, lr in middles.items())
        for label, middle in middles.items():
            seeds = [_run(size, tokens, label, middle, seed) for seed in SEEDS]
            if at and any(run.key not in results for run in seeds):
                continue
            runs = search(lambda lr, x=label, n=tokens: _run(size, n, x, lr), middle, results)
            yield from (run for run in runs if not (at and run.lr == middle))
            if rate := best(runs, results):
                searches[label] = rate
                if not (at and rate == middle):
                    yield from (_run(size, tokens, label, rate, seed) for seed in SEEDS[1:])
        middles = searches


def _run(size: Size, tokens: float, label: str, lr: float, seed: int = SEEDS[0]) -> Run:
    iters = size.iterations(tokens)
    # The validation loss is computed once, at the end: an evaluation takes as long as 60 iterations.
    model = f"{size.flags} --train-iters {iters} --eval-interval {iters + 1}"
    return Run(
        f"{size.name} parameters x {tokens:g} tokens",
        label,
        OPTIMIZERS[label][0],
        lr,
        seed,
        {"million": size.parameters / 1e6, "tokens": tokens},
        f"{model} --log-interval {max(1, iters // 120)}",
    )
