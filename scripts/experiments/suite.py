"""The runs of the suite.  Runs that depend on earlier results are planned when those exist."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["EXPERIMENTS", "Run", "best", "best_rate", "plan", "search", "waiting"]

SEEDS = (1234, 2345, 3456)
#: Ratio of neighboring learning rates in a search.
FACTOR = 3.0
#: Number of learning rates in a search: at first, and at most if the best one lies at an end.
FIRST, MOST = 3, 6
#: lr * weight_decay, which the paper keeps constant.
DECAY = 3e-5

_ADAMW = "--optimizer adamw --adamw-beta1 0.9 --adamw-beta2 0.95 --clip-grad 1"
_NADAM = "--optimizer nadam --clip-grad 1"
_LONG = "--lr-warmup-fraction 0.3"

#: By experiment and label: the optimizer's flags, and the middle learning rate of its search.
SEARCHES: dict[str, dict[str, tuple[str, float]]] = {
    "optimizers": {
        "S3": ("--optimizer s3", 6e-3),
        "AdamW": (_ADAMW, 6e-3),
        "NAdam": (_NADAM, 6e-3),
        "Adan": ("--optimizer adan --clip-grad 1", 6e-3),
        "Lion": ("--optimizer lion --clip-grad 1", 6e-4),
        "SignSGD with momentum": ("--optimizer signsgd --clip-grad 1", 6e-4),
        "SignSGD": ("--optimizer signsgd --signsgd-momentum 0 --clip-grad 1", 6e-4),
        "SGD with momentum": ("--optimizer sgdm --clip-grad 1", 0.3),
        "AdamW, clipped updates": (
            "--optimizer adamw --adamw-clip-update 1 --clip-grad 0",
            6e-3,
        ),
    },
    "ablations": {
        "S3, p=1": ("--optimizer s3 --s3-p 1", 6e-3),
        "S3, p=2": ("--optimizer s3 --s3-p 2", 6e-3),
        "S3, p=4": ("--optimizer s3 --s3-p 4", 6e-3),
        "S3, no NAG": ("--optimizer s3 --s3-no-nesterov", 6e-3),
        "S3, beta .9, beta2 .95": ("--optimizer s3 --s3-beta 0.9 --s3-beta2 0.95", 6e-3),
    },
    "recipes": {
        "S3, warmup 30 %": (f"--optimizer s3 {_LONG}", 6e-3),
        "S3, beta .9, warmup 30 %": (f"--optimizer s3 --s3-beta 0.9 {_LONG}", 6e-3),
        "S3, ramp": ("--optimizer s3 --s3-beta-ramp", 6e-3),
        "S3, ramp, warmup 30 %": (f"--optimizer s3 --s3-beta-ramp {_LONG}", 6e-3),
        "S3, bounded gradients": ("--optimizer s3 --s3-grad-bound 10", 6e-3),
        "AdamW, warmup 30 %": (f"{_ADAMW} {_LONG}", 6e-3),
        "NAdam, warmup 30 %": (f"{_NADAM} {_LONG}", 6e-3),
    },
}
#: Values of p and beta in Figure 9.
GRID = [(p, beta) for p in (2, 3, 4) for beta in (0.9, 0.95, 0.98)]
#: Figure 8: multiples of the best learning rate, and the optimizers that are trained at them.
LARGE = {"factors": (3.0, 10.0), "of": ("S3", "AdamW", "NAdam")}
#: Factor by which one gradient in the middle of a run is multiplied.
BURST = 1000.0
#: By label: flags, and the optimizer at whose best learning rate the run is trained.
BURSTS = {
    "S3": ("--optimizer s3", "S3"),
    "S3, bounded gradients": ("--optimizer s3 --s3-grad-bound 10", "S3"),
    "S3, clipped": ("--optimizer s3 --clip-grad 1", "S3"),
    "AdamW": (_ADAMW, "AdamW"),
    "AdamW, unclipped": (_ADAMW.replace("--clip-grad 1", "--clip-grad 0"), "AdamW"),
    "NAdam": (_NADAM, "NAdam"),
}
#: By label: flags.
ROBUST = {
    "S3": "--optimizer s3",
    "S3, ramp": "--optimizer s3 --s3-beta-ramp",
    **{
        f"S3, ramp, bound {k:g}": f"--optimizer s3 --s3-beta-ramp --s3-grad-bound {k:g}"
        for k in (10, 5, 3, 2, 1.5)
    },
    "S3, cautious": "--optimizer s3 --s3-beta-ramp --s3-grad-bound 5 --s3-cautious",
    "AdamW": _ADAMW,
    "AdamW, unclipped": _ADAMW.replace("--clip-grad 1", "--clip-grad 0"),
    "NAdam": _NADAM,
    "NAdam, unclipped": _NADAM.replace("--clip-grad 1", "--clip-grad 0"),
}
#: The best learning rate of S3, AdamW and NAdam alike, in the search of 600 iterations.
ROBUST_RATE = 6e-3
#: What disturbs the middle of a run: a multiplied gradient, of one of two ranks or of the only one;
#: batches of random bytes; batches of C++ between those of Python.
DISTURBED: tuple[dict[str, float], ...] = (
    {"burst": 1.0, "corrupted": 0.0},
    {"burst": BURST, "corrupted": 0.0},
    {"burst": 1.0, "corrupted": 10.0},
    {"burst": 1.0, "corrupted": 0.0, "cpp": 60.0},
    {"burst": 1.0, "corrupted": 0.0, "ranks": 2.0},
    {"burst": BURST, "corrupted": 0.0, "ranks": 2.0},
)
EXPERIMENTS = (*SEARCHES, "grid", "large rates", "burst", "robustness")
#: The optimizers at whose best learning rates an experiment runs, and its number of runs.
NEEDS: dict[str, tuple[tuple[str, ...], int]] = {
    "grid": (("S3",), len(GRID)),
    "large rates": (LARGE["of"], len(LARGE["of"]) * len(LARGE["factors"])),
    "burst": (tuple(dict.fromkeys(of for _, of in BURSTS.values())), 2 * len(BURSTS)),
}


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        experiment: one of :data:`EXPERIMENTS`.
        label: the name of the row in the experiment's table.
        flags: Megatron's flags, without learning rate, weight decay and seed.
        lr: peak learning rate.
        seed: seed of the initialization and the data order.
        tags: other values that distinguish the run, by name.
        model: Megatron's flags of a model and a length that are not those of the suite.
        decay: learning rate times weight decay.
        floor: final learning rate divided by the peak.
    """

    experiment: str
    label: str
    flags: str
    lr: float
    seed: int = SEEDS[0]
    tags: Mapping[str, float | str] = field(default_factory=dict)
    model: str = ""
    decay: float = DECAY
    floor: float = 0.1

    @property
    def name(self) -> str:
        """Returns the name of the run's folder in the folder of the experiment."""
        words = [self.label, f"lr {self.lr:g}", f"seed {self.seed}"]
        words += [f"{k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in self.tags.items()]
        plain = "-".join(words).lower().replace("%", "percent")
        return "-".join(re.sub(r"[^a-z0-9.+-]", " ", plain).split())

    @property
    def key(self) -> str:
        """Returns the key of the run's result: the experiment and the name."""
        return f"{self.experiment.replace(' ', '-')}/{self.name}"

    @property
    def ranks(self) -> int:
        """Returns the number of its processes."""
        return int(self.tags.get("ranks", 1))

    @property
    def words(self) -> list[str]:
        """Returns all flags of the run."""
        rates = ["--lr", f"{self.lr:g}", "--min-lr", f"{self.lr * self.floor:g}"]
        decay = ["--weight-decay", f"{self.decay / self.lr:g}"]
        seed = ["--seed", str(self.seed)]
        return [*self.model.split(), *self.flags.split(), *rates, *decay, *seed]


def plan(
    results: Mapping[str, float],
    only: Sequence[str] = EXPERIMENTS,
    labels: Sequence[str] | None = None,
) -> list[Run]:
    """Returns the runs that can be planned from the present results, including finished ones.

    Args:
        results: final validation loss by :attr:`Run.key`; NaN or inf for a run that diverged.
        only: experiments; the searches on which they depend are added.
        labels: labels of :data:`SEARCHES` to search, and of :data:`ROBUST`; all if None. Runs that
            depend on other labels are left out.
    """
    found = []
    for experiment, of in SEARCHES.items():
        for label in of:
            needed = experiment == "optimizers" and any(
                label in NEEDS[e][0] for e in only if e in NEEDS
            )
            if (experiment in only or needed) and (labels is None or label in labels):
                found += _search(experiment, label, results)
    s3 = best_rate("S3", results)
    if "grid" in only and s3:
        for p, beta in GRID:
            flags = f"--optimizer s3 --s3-p {p} --s3-beta {beta}"
            tags = {"p": p, "beta": beta}
            found.append(Run("grid", f"S3, p={p}, beta {beta}", flags, s3, tags=tags))
    if "large rates" in only:
        found += _large_rates(results)
    if "burst" in only:
        found += _bursts(results)
    if "robustness" in only:
        found += [run for run in _robustness() if labels is None or run.label in labels]
    return found


def waiting(
    results: Mapping[str, float],
    only: Sequence[str] = EXPERIMENTS,
    labels: Sequence[str] | None = None,
) -> list[str]:
    """Returns a line for each experiment with runs that cannot be planned yet, and the reason.

    Args:
        results: final validation loss by :attr:`Run.key`.
        only: experiments.
        labels: labels of :data:`SEARCHES` to search; all if None.
    """
    lines = []
    for experiment in only:
        if experiment in NEEDS:
            of, runs = NEEDS[experiment]
            open_ = [each for each in of if best_rate(each, results) is None]
            never = [each for each in open_ if labels is not None and each not in labels]
            if open_:
                why = f"the best learning rate of {', '.join(open_)} is known"
                more = f" (--of leaves out {', '.join(never)})" if never else ""
                lines.append(f"{experiment}: up to {runs} runs, planned when {why}{more}")
        elif experiment in SEARCHES:
            of = tuple(each for each in SEARCHES[experiment] if labels is None or each in labels)
            open_ = [each for each in of if best_rate(each, results, experiment) is None]
            if open_:
                lines.append(
                    f"{experiment}: more learning rates and {len(SEEDS) - 1} more seeds of each of "
                    f"{len(open_)} rows, planned when the losses of these runs are known"
                )
    return lines


def _large_rates(results: Mapping[str, float]) -> Iterator[Run]:
    for label in LARGE["of"]:
        if rate := best_rate(label, results):
            flags = SEARCHES["optimizers"][label][0]
            for factor in LARGE["factors"]:
                lr = _rounded(rate * factor)
                yield Run("large rates", label, flags, lr, tags={"times": factor})


def _bursts(results: Mapping[str, float]) -> Iterator[Run]:
    for label, (flags, of) in BURSTS.items():
        if rate := best_rate(of, results):
            for burst in (1.0, BURST):
                yield Run("burst", label, flags, rate, tags={"burst": burst})


def _robustness() -> Iterator[Run]:
    # Each loss is logged; the only evaluation is the one after training.
    model = "--log-interval 1 --eval-interval 1000000"
    for seed in SEEDS:
        for tags in DISTURBED:
            of = f"{model} --micro-batch-size 8" if "ranks" in tags else model
            for label, flags in ROBUST.items():
                yield Run("robustness", label, flags, ROBUST_RATE, seed, tags, of)


def best_rate(
    label: str, results: Mapping[str, float], experiment: str = "optimizers"
) -> float | None:
    """Returns the best learning rate of a finished search; None if it is not finished."""
    return best(_rates(experiment, label, results), results)


def best(runs: Sequence[Run], results: Mapping[str, float]) -> float | None:
    """Returns the best learning rate of the runs of :func:`search`; None if it is not finished."""
    losses = [_loss(run, results) for run in runs]
    if None in losses or not _inside(losses):
        return None
    return runs[losses.index(min(losses))].lr


def _search(experiment: str, label: str, results: Mapping[str, float]) -> Iterator[Run]:
    """Yields the runs of a search, and when it is finished, other seeds of the best one."""
    yield from _rates(experiment, label, results)
    if rate := best_rate(label, results, experiment):
        for seed in SEEDS[1:]:
            yield Run(experiment, label, SEARCHES[experiment][label][0], rate, seed)


def _rates(experiment: str, label: str, results: Mapping[str, float]) -> list[Run]:
    flags, middle = SEARCHES[experiment][label]
    return search(lambda lr: Run(experiment, label, flags, lr), middle, results)


def search(make: Callable[[float], Run], middle: float, results: Mapping[str, float]) -> list[Run]:
    """Returns the runs of a search of the learning rate, in the order of their rates.

    There are :data:`FIRST` rates around the middle, and others at an end where the best one lies,
    up to :data:`MOST`.

    Args:
        make: returns the run with a learning rate.
        middle: learning rate in the middle of the first ones.
        results: final validation loss by :attr:`Run.key`.
    """
    low, high = -(FIRST // 2), FIRST // 2
    while True:
        runs = [make(_rounded(middle * FACTOR**k)) for k in range(low, high + 1)]
        losses = [_loss(run, results) for run in runs]
        if None in losses or _inside(losses):
            return runs
        if losses.index(min(losses)) == 0:
            low -= 1
        else:
            high += 1


def _inside(losses: Sequence[float]) -> bool:
    at = losses.index(min(losses))
    return 0 < at < len(losses) - 1 or len(losses) >= MOST


def _loss(run: Run, results: Mapping[str, float]) -> float | None:
    loss = results.get(run.key)
    return loss if loss is None or math.isfinite(loss) else math.inf


def _rounded(rate: float) -> float:
    return float(f"{rate:.1g}")
