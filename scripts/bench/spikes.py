"""Counts hits and misses of spike detectors: `python -m scripts.bench.spikes`.

The losses are synthetic, so that their spikes are known.  The detectors' defaults were chosen with
other seeds than those of the table.  Beside the package's own detector and the scores of
:mod:`megatron_s3.telemetry.detectors`, Megatron-LM's is counted (megatron/core/
rerun_state_machine.py): it flags losses above 10 times the largest of the first 100.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_s3.telemetry.detectors import OLMO2, OLMO_CORE, deviations
from megatron_s3.telemetry.spikes import SpikeDetector

__all__ = ["DETECTORS", "Curve", "curve", "main", "score"]

STEPS = 4000


def _ours(losses: list[float]) -> Iterator[bool]:
    detector = SpikeDetector()
    for i, loss in enumerate(losses):
        detector.add(i, loss)
        yield detector.open is not None


def _largest(losses: list[float]) -> Iterator[bool]:
    limit = 10 * max(losses[:100])
    return (i >= 100 and loss > limit for i, loss in enumerate(losses))


#: Detectors by name: each yields, for every loss, whether it belongs to a spike.
DETECTORS: dict[str, Callable[[list[float]], Iterator[bool]]] = {
    "megatron_s3": _ours,
    "mean + 6 sigma of 128 (OLMo-core)": lambda losses: deviations(losses, *OLMO_CORE),
    "mean + 7 sigma of 1,000 (OLMo 2)": lambda losses: deviations(losses, *OLMO2),
    "10 x largest of first 100 (Megatron-LM)": _largest,
}


@dataclass(frozen=True)
class Curve:
    """Losses, and their spikes: first iteration, last iteration, height in nats."""

    losses: list[float]
    spikes: list[tuple[int, int, float]]


def curve(seed: int, spikes: int = 4) -> Curve:
    """Returns a decaying loss with noise of random size and tails, and with spikes.

    Args:
        seed: the seed of everything random.
        spikes: the maximum number of spikes.  None is within the first 200 iterations.  They are at
            least 150 iterations apart, except for pairs, which are 40 apart.
    """
    draw = random.Random(seed)
    final, start, power = draw.uniform(1.5, 3.5), draw.uniform(5, 11), draw.uniform(0.3, 0.7)
    noise, tails = 10 ** draw.uniform(-2.5, -1.3), draw.choice([4, 8, 1000])
    losses = []
    for i in range(STEPS):
        trend = final + (start - final) * (1 + i / 20) ** -power
        trend -= 0.1 * final * (1 - math.cos(math.pi * max(0, i - 3000) / 1000)) / 2
        chi = math.sqrt(sum(draw.gauss(0, 1) ** 2 for _ in range(min(tails, 8))) / min(tails, 8))
        student = draw.gauss(0, 1) / (chi if tails < 1000 else 1)
        losses.append(trend * (1 + noise * student * (1 + 2 / (1 + i / 100))))
    placed: list[tuple[int, int, float]] = []
    at = draw.randint(200, 700)
    while len(placed) < spikes and at < STEPS - 300:
        height = 10 ** draw.uniform(math.log10(max(0.1, 12 * noise * final)), math.log10(3))
        width = draw.choice([1, 3, 10, 40, 150])
        for i in range(at, at + width):
            losses[i] += height * (1 if width < 3 else math.exp(-3 * (i - at) / width))
        placed.append((at, at + width - 1, height))
        near = draw.random() < 0.25
        at += width + (40 if near else draw.randint(150, 900))
    return Curve(losses, placed)


@dataclass
class Score:
    """The result of a detector on one or more curves.

    Attributes:
        found: number of spikes with at least one flagged loss.
        missed: number of the other spikes.
        false: number of false alarms: runs of flags that begin outside of all spikes.
        steps: number of iterations.
        delays: iterations from the start of each found spike to its first flag.
    """

    found: int = 0
    missed: int = 0
    false: int = 0
    steps: int = 0
    delays: list[int] | None = None


def score(flags: list[bool], of: Curve, into: Score) -> None:
    """Adds the flags of a detector on one curve to a score."""
    into.delays = into.delays or []
    into.steps += len(flags)
    explained = [False] * len(flags)
    for first, last, _ in of.spikes:
        hits = [i for i in range(first, last + 1) if flags[i]]
        into.found += bool(hits)
        into.missed += not hits
        into.delays += [hits[0] - first] if hits else []
        for i in range(first, min(len(flags), last + 30)):
            explained[i] = True  # a decaying spike has no sharp end
    starts = (i for i, flag in enumerate(flags) if flag and not (i and flags[i - 1]))
    into.false += sum(not explained[i] for i in starts)


def recorded(report: Path) -> list[Curve]:
    """Returns the training losses in a `report.json` of `megatron-s3 report`.

    A run with an enlarged gradient has a spike if one of its losses is more than 0.1 nats above
    that of the run without it. The spike begins at the first loss that differs. All other alarms
    count as false.
    """
    found = []
    for suite in json.loads(report.read_text(encoding="utf-8")):
        losses = {_key(run, run["tags"].get("burst", 1)): _losses(run) for run in suite["runs"]}
        for run in suite["runs"]:
            spikes = []
            own = _losses(run)
            if run["tags"].get("burst", 1) != 1:
                rise = [a - b for a, b in zip(own, losses[_key(run, 1)], strict=True)]
                if max(rise) > 0.1:
                    begin = next(i for i, r in enumerate(rise) if r)
                    spikes.append((begin, len(own) - 1, max(rise)))
            found.append(Curve(own, spikes))
    return found


def _key(run: Mapping, burst: float) -> tuple:
    return run["experiment"], run["label"], run["lr"], run["seed"], burst


def _losses(run: Mapping) -> list[float]:
    return [float(loss) for _, loss in run["loss"]]


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="*", type=Path, metavar="REPORT",
                        help="report.json of recorded runs to use instead")  # fmt: skip
    parser.add_argument("--curves", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1000, help="seed of the first curve")
    options = parser.parse_args(argv)
    curves = []
    for report in options.reports:
        try:
            curves += recorded(report)
        except OSError as error:
            parser.error(f"{report}: cannot be read ({error.strerror})")
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            parser.error(f"{report}: not a report.json of megatron-s3 report ({what})")
    if options.curves < 1:
        parser.error(f"--curves {options.curves}: give at least 1")
    if options.reports and not curves:
        parser.error(f"no run in {', '.join(map(str, options.reports))}")
    curves = curves or [curve(options.seed + k) for k in range(options.curves)]
    total = sum(len(c.spikes) for c in curves)
    count = sum(len(c.losses) for c in curves)
    heights = [height for c in curves for *_, height in c.spikes]
    between = f" of {min(heights):.1f} to {max(heights):.1f} nats" if heights else ""
    print(f"{len(curves)} curves, {count:,} losses, {total} spikes{between}\n")
    print(f"{'':42}found missed  false alarms in 10,000  median delay")
    for name, detect in DETECTORS.items():
        s = Score()
        for c in curves:
            score(list(detect(c.losses)), c, s)
        delay = f"{statistics.median(s.delays):14.0f}" if s.delays else f"{'-':>14}"
        print(f"{name:42}{s.found:5} {s.missed:6} {1e4 * s.false / s.steps:23.2f}{delay}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
