"""Sweeps: one setting of a run at a time, each against AdamW with the same setting.

The runs have the model of :mod:`~scripts.experiments.length` and 10 tokens a parameter; its runs of
that length are the row of the usual setting.  Every optimizer's learning rate is searched at every
setting.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from scripts.experiments import length
from scripts.experiments.suite import DECAY, FIRST, MOST, SEEDS, Run, best, search

__all__ = ["SWEEPS", "Setting", "cost", "plan"]

#: Tokens a parameter.
TOKENS = 10
SIZE = length.SIZES["0.12M"]
#: The optimizers that are compared unless others are asked for.
OF = ("S3, cautious", "AdamW")
_SAMPLES = 16


@dataclass(frozen=True)
class Setting:
    """A value of a setting.

    Attributes:
        flags: Megatron's flags.
        own: flags by optimizer; only the optimizers named in it are trained, all if it is empty.
        batch: samples of an iteration.
        floor: final learning rate divided by the peak.
        decay: learning rate times weight decay.
        time: duration of a run divided by that of the usual one.
    """

    flags: str = ""
    own: Mapping[str, str] = field(default_factory=dict)
    batch: int = _SAMPLES
    floor: float = 0.1
    decay: float = DECAY
    time: float = 1.0


def _beta(value: str) -> Setting:
    # AdamW's and NAdam's second beta; S3 has one.
    return Setting(
        own={label: f"--s3-beta {value}" for label in length.OPTIMIZERS if label[:2] == "S3"}
        | {"AdamW": f"--adamw-beta2 {value}", "NAdam": f"--nadam-beta2 {value}"}
    )


def _batch(samples: int) -> Setting:
    flags = f"--micro-batch-size {samples} --global-batch-size {samples}"
    # The same text is evaluated, whatever the batch.
    flags += f" --eval-micro-batch-size {_SAMPLES} --eval-global-batch-size {_SAMPLES}"
    # With as many tokens, the sum of all decays stays.
    return Setting(flags, batch=samples, decay=DECAY * samples / _SAMPLES)


_STABLE = "--lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters"
#: By experiment, the values of its setting besides the usual one.
SWEEPS: dict[str, dict[str, Setting]] = {
    "batch size": {f"{n}": _batch(n) for n in (8, 64, 256)},
    "beta": {value: _beta(value) for value in ("0.9", "0.98")},
    "schedule": {
        "cosine to 0": Setting(floor=0),
        "constant, then linear to 0": Setting(
            f"{_STABLE} {round(SIZE.iterations(TOKENS) / 5)}", floor=0
        ),
    },
    "lr x weight decay": {f"{x:g}": Setting(decay=x) for x in (0.0, 3e-4)},
    "layers": {f"{n}": Setting(f"--num-layers {n}", time=n / 2) for n in (1, 4, 8)},
}


def plan(
    results: Mapping[str, float],
    sweeps: Sequence[str],
    labels: Sequence[str] | None = None,
    values: Sequence[str] | None = None,
) -> list[Run]:
    """Returns the runs that can be planned from the present results, including finished ones.

    Args:
        results: final validation loss by :attr:`Run.key`.
        sweeps: keys of :data:`SWEEPS`.
        labels: labels of :data:`length.OPTIMIZERS`; :data:`OF` if None.
        values: settings of the sweeps; all if None.
    """
    of = [label for label in length.OPTIMIZERS if label in (labels or OF)]
    found = length.plan(results, [SIZE], [TOKENS], of)
    others = []  # seeds are trained when all rates are known
    for name, value, setting in _chosen(sweeps, values):
        for label in of:
            if not setting.own or label in setting.own:
                run, middle = _runs(name, value, setting, label)
                runs = search(run, middle, results)
                found += runs
                if rate := best(runs, results):
                    others += [run(rate, seed) for seed in SEEDS[1:]]
    return found + others


def cost(
    sweeps: Sequence[str],
    labels: Sequence[str] | None = None,
    values: Sequence[str] | None = None,
) -> list[str]:
    """Returns a line for each setting: its runs, and their time on one core.

    Args:
        sweeps: keys of :data:`SWEEPS`.
        labels: labels of :data:`length.OPTIMIZERS`; :data:`OF` if None.
        values: settings of the sweeps; all if None.
    """
    of = [label for label in length.OPTIMIZERS if label in (labels or OF)]
    few, many = FIRST + len(SEEDS) - 1, MOST + len(SEEDS) - 1
    lines = []
    for name, value, setting in _chosen(sweeps, values):
        rows = sum(not setting.own or label in setting.own for label in of)
        hours = SIZE.seconds * SIZE.iterations(TOKENS) / 3600 * setting.time * rows
        lines.append(
            f"{name} {value}: {few * rows} to {many * rows} runs, {few * hours:.2g} to "
            f"{many * hours:.2g} hours on one core"
        )
    return lines


def _chosen(sweeps: Sequence[str], values: Sequence[str] | None) -> list[tuple[str, str, Setting]]:
    return [
        (name, value, setting)
        for name in sweeps
        for value, setting in SWEEPS[name].items()
        if values is None or value in values
    ]


def _runs(name: str, value: str, setting: Setting, label: str) -> tuple[Callable[..., Run], float]:
    """Returns a function of a learning rate and a seed, and the middle learning rate."""
    iters = round(SIZE.iterations(TOKENS) * _SAMPLES / setting.batch)
    model = f"{SIZE.flags} {setting.flags} --train-iters {iters} --lr-warmup-fraction 0.1"
    model += f" --eval-interval {iters + 1} --log-interval {max(1, iters // 120)}"
    flags, middle = length.OPTIMIZERS[label]
    flags = f"{flags} {setting.own.get(label, '')}".strip()

    def run(lr: float, seed: int = SEEDS[0]) -> Run:
        tags = {"setting": value}
        return Run(name, label, flags, lr, seed, tags, model, setting.decay, setting.floor)

    return run, float(f"{middle * math.sqrt(setting.batch / _SAMPLES):.1g}")
