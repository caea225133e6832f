"""Long runs: sizes of a GPT, tokens a parameter, optimizers, and what they cost.

At the shortest length each optimizer's learning rate is searched as in the suite.  At a longer one
the search begins around the best rate of the length before, whose seeds are trained first.  The
rate is chosen on validation documents; the loss that is reported is that of other documents.
"""

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_s3.launch.config import load
from scripts.experiments.suite import FIRST, MOST, SEARCHES, SEEDS, Run, best, search

__all__ = ["LENGTHS", "NEEDED", "OPTIMIZERS", "SIZES", "Size", "configured", "cost", "missing"]
__all__ += ["plan"]

#: Tokens a parameter.
LENGTHS = (20, 100)
#: A run that takes more seconds saves checkpoints, from which it is resumed.
SAVED = 900
_OF = SEARCHES["optimizers"]
#: The learning rate of S3 around which the first search begins.
_RATE = _OF["S3"][1]
_BOUNDED = "--optimizer s3 --s3-beta-ramp --s3-grad-bound 5"
#: By label: the optimizer's flags, and the middle learning rate of its search at the first length.
OPTIMIZERS: dict[str, tuple[str, float]] = {
    "S3": _OF["S3"],
    "S3, cautious": (f"{_BOUNDED} --s3-cautious --s3-cautious-steps 4000", 1e-2),
    "S3, ramp, bound 5": (_BOUNDED, _RATE),
    "AdamW": _OF["AdamW"],
    "NAdam": _OF["NAdam"],
    "S3, ramp": ("--optimizer s3 --s3-beta-ramp", _RATE),
    "Adan": _OF["Adan"],
    "Lion": _OF["Lion"],
    # Megatron's Muon and SOAP step on the matrices of the layers, the other optimizer on the rest.
    "Muon": ("--optimizer muon --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1", 6e-3),
    "Muon, S3": (
        "--optimizer muon --muon-scalar-optimizer s3 --s3-beta-ramp --s3-grad-bound 5 "
        "--s3-cautious --s3-cautious-steps 4000 --clip-grad 0",
        6e-3,
    ),
    "SOAP": ("--optimizer soap --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1", 6e-3),
}
#: By label, the package that a row needs besides; such a row is planned only where it is named.
NEEDED = dict.fromkeys(("Muon", "Muon, S3", "SOAP"), "emerging-optimizers==0.3.0")


@dataclass(frozen=True)
class Size:
    """A model.

    Attributes:
        name: its name, such as "0.12M".
        flags: Megatron's flags of its shape.
        parameters: number of its parameters.
        seconds: seconds of an iteration on one core of the machine of the results, while its other
            core is idle; NaN if it is not known.
        batch: tokens of an iteration.
        rate: factor of the middle learning rates.
    """

    name: str
    flags: str
    parameters: int
    seconds: float
    batch: int = 1024
    rate: float = 1.0

    def iterations(self, tokens: float) -> int:
        """Returns the iterations of so many tokens a parameter."""
        return max(1, round(tokens * self.parameters / self.batch))


def _small(name: str, layers: int, hidden: int, seconds: float) -> Size:
    # The layers; the last norm; 272 tokens (257, made divisible by 16) and 64 positions.
    parameters = layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden + (272 + 64) * hidden
    flags = f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads 4"
    return Size(name, flags, parameters, seconds)


SIZES = {
    size.name: size
    for size in (
        _small("0.12M", 2, 64, 0.036),
        _small("0.8M", 4, 128, 0.11),
        _small("3M", 6, 200, 0.33),
    )
}


def configured(names: Sequence[str]) -> Size:
    """Returns the model of a configuration, which `megatron-s3 plan` counts.

    Args:
        names: the configuration, and overlays.

    Raises:
        SystemExit: the configuration is rejected.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "plan.json")
        command = [sys.executable, "-m", "megatron_s3.cli", "plan", *names, "--json", str(file)]
        if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            sys.exit(status)
        found = json.loads(file.read_text(encoding="utf-8"))
    lr = float(str(load(list(names)).arguments["lr"]))
    batch = found["batch"] * found["sequence"]
    return Size(Path(names[0]).stem, "", found["sizes"]["parameters"], math.nan, batch, lr / _RATE)


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
        labels: labels of :data:`OPTIMIZERS`; all but those of :data:`NEEDED` if None.
    """
    of = _asked(labels)
    return [run for size in sizes for run in _of_size(size, sorted(set(lengths)), of, results)]


def cost(
    sizes: Sequence[Size],
    lengths: Sequence[float] = LENGTHS,
    labels: Sequence[str] | None = None,
) -> list[str]:
    """Returns a line for each size and length: its runs, and their time on one core.

    Args:
        sizes: models.
        lengths: tokens a parameter.
        labels: labels of :data:`OPTIMIZERS`; all but those of :data:`NEEDED` if None.
    """
    of = len(_asked(labels))
    seeds, lines = len(SEEDS), []
    for size in sizes:
        for at, tokens in enumerate(sorted(set(lengths))):
            # At a longer length, one rate has its seeds before the others are tried.
            few, many = FIRST + seeds - 1, MOST + seeds - 1 + (seeds - 1 if at else 0)
            iters = size.iterations(tokens)
            line = f"{size.name} parameters x {tokens:g} tokens: {few * of} to {many * of} runs of "
            line += f"{iters:,} iterations with {size.batch:,} tokens"
            if math.isfinite(size.seconds):
                hours = size.seconds * iters / 3600
                line += f", {_hours(hours)} hours each on one core, {_hours(few * of * hours)} to "
                line += f"{_hours(many * of * hours)} in all"
            else:
                line += "; for their time: megatron-s3 plan --set "
                line += f"train_iters={iters} --set lr_warmup_iters={iters // 10}"
            lines.append(line)
    return lines


def missing(labels: Sequence[str] | None) -> str | None:
    """Returns the package that the rows need and that is not installed; None if all are."""
    for package in (NEEDED[label] for label in _asked(labels) if label in NEEDED):
        if importlib.util.find_spec(package.split("==")[0].replace("-", "_")) is None:
            return package
    return None


def _asked(labels: Sequence[str] | None) -> list[str]:
    usual = [label for label in OPTIMIZERS if label not in NEEDED]
    return usual if labels is None else [label for label in OPTIMIZERS if label in labels]


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _of_size(
    size: Size, lengths: Sequence[float], labels: Sequence[str], results: Mapping[str, float]
) -> Iterator[Run]:
    middles = {label: float(f"{OPTIMIZERS[label][1] * size.rate:.1g}") for label in labels}
    for at, tokens in enumerate(lengths):
        if at:
            for seed in SEEDS:
                yield from (_run(size, tokens, label, lr, seed) for label, lr in middles.items())
        found = {}
        for label, middle in middles.items():
            seeds = [_run(size, tokens, label, middle, seed) for seed in SEEDS]
            if at and any(run.key not in results for run in seeds):
                continue
            runs = search(lambda lr, x=label, n=tokens: _run(size, n, x, lr), middle, results)
            yield from (run for run in runs if not (at and run.lr == middle))
            if rate := best(runs, results):
                found[label] = rate
                if not (at and rate == middle):
                    yield from (_run(size, tokens, label, rate, seed) for seed in SEEDS[1:])
        middles = found


def _run(size: Size, tokens: float, label: str, lr: float, seed: int = SEEDS[0]) -> Run:
    iters = size.iterations(tokens)
    # The only evaluation is the one after training: each takes as long as 60 iterations.
    model = f"{size.flags} --train-iters {iters} --lr-warmup-fraction 0.1 --eval-interval "
    if size.seconds * iters > SAVED:
        model = f"--save-interval {math.ceil(iters / 20)} {model}"
    return Run(
        f"{size.name} parameters x {tokens:g} tokens",
        label,
        OPTIMIZERS[label][0],
        lr,
        seed,
        {"million": size.parameters / 1e6, "tokens": tokens},
        f"{model} {iters + 1} --log-interval {max(1, iters // 120)}",
    )
