"""Figure 1: optimizers on the paper's problem in two dimensions."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_s3 import S3

__all__ = ["trajectories", "write"]

STEPS = 1000
START = (1.0, 1.0)
#: Standard deviation of the noise that is added to both elements of the gradient.
NOISE = 0.1
SEEDS = (1, 2, 3)
RATES = tuple(10 ** (k / 2) for k in range(-8, 1))

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "S3": lambda x, lr: S3(x, lr=lr),
    "Adam": lambda x, lr: torch.optim.Adam(x, lr=lr, betas=(0.9, 0.999), foreach=False),
    "Adam, beta .95 both": lambda x, lr: torch.optim.Adam(
        x, lr=lr, betas=(0.95, 0.95), foreach=False
    ),
    "SignSGD": lambda x, lr: S3(x, lr=lr, beta=0.0, p=1.0),  # n/b = sign(g)
    "SGD": lambda x, lr: torch.optim.SGD(x, lr=lr, foreach=False),
}


def loss(x: float, y: float) -> float:
    """Returns the loss, which is 0 at (sqrt 20, 1/sqrt 20) and at the negative of this point."""
    return 0.5 * (x - 1 / y) ** 2 + 0.5 * (x - 20 * y) ** 2


def gradient(x: float, y: float) -> tuple[float, float]:
    """Returns the gradient of :func:`loss`."""
    a, b = x - 1 / y, x - 20 * y
    return a + b, a / y**2 - 20 * b


def train(label: str, lr: float, noise: float, seed: int) -> dict[str, list]:
    """Trains at a constant learning rate; stops if the run diverges.

    Returns:
        The points (``x``), the losses (``loss``) and the mean |u| (``update``) of each step.
    """
    x = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = _OPTIMIZERS[label]([x], lr)
    random = torch.Generator().manual_seed(seed)
    points, losses, updates = [list(START)], [loss(*START)], []
    for _ in range(STEPS):
        g = torch.tensor(gradient(*points[-1]), dtype=torch.float64)
        x.grad = g + noise * torch.randn(2, generator=random, dtype=torch.float64)
        optimizer.step()
        point = x.tolist()
        if not all(1e-6 < abs(v) < 1e6 for v in point):
            break
        updates.append(
            statistics.fmean(abs(a - b) / lr for a, b in zip(point, points[-1], strict=True))
        )
        points.append(point)
        losses.append(loss(*point))
    return {"x": points, "loss": losses, "update": updates}


def end(losses: list[float]) -> float:
    """Returns the median loss of the last tenth of the steps; inf if the run diverged before."""
    return statistics.median(losses[-STEPS // 10 :]) if len(losses) == STEPS + 1 else math.inf


def trajectories() -> dict[str, dict[str, dict]]:
    """Trains each optimizer with and without noise, at the best learning rate of :data:`RATES`.

    Returns:
        By noise and label: ``lr``; ``x``, ``loss`` and ``update`` of the first seed; and ``end``,
        the final loss of each seed.
    """
    found: dict[str, dict[str, dict]] = {}
    for noise, seeds in ((0.0, SEEDS[:1]), (NOISE, SEEDS)):
        for label in _OPTIMIZERS:
            tried = {lr: [train(label, lr, noise, seed) for seed in seeds] for lr in RATES}
            ends = {lr: [end(run["loss"]) for run in runs] for lr, runs in tried.items()}
            best = min(RATES, key=lambda lr: statistics.median(ends[lr]))
            found.setdefault(f"noise {noise:g}", {})[label] = {
                "lr": best, "end": ends[best], **tried[best][0],
            }  # fmt: skip
    return found


def write(path: Path) -> None:
    """Writes the trajectories as JSON, and prints a line with the final losses of each."""
    found = trajectories()
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    for noise, runs in found.items():
        for label, run in runs.items():
            ends = ", ".join(f"{e:.3g}" for e in run["end"])
            print(f"toy, {noise}: {label} (rate {run['lr']:.2g}) ends at a loss of {ends}")
