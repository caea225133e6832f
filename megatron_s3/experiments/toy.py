"""Figure 1: optimizers on a valley in two dimensions."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_s3 import S3

__all__ = ["trajectories", "write"]

STEPS = 300
START = (1.0, 1.0)

_OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "S3": lambda p: S3(p, lr=0.05),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.9, 0.999)),
    "Adam, beta .95 both": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.95, 0.95)),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.95),
}


def valley(x: torch.Tensor) -> torch.Tensor:
    """A hundred times steeper one way than the other; 0 at the origin."""
    return 0.5 * (x[0] ** 2 + 100 * x[1] ** 2)


def trajectories() -> dict[str, dict[str, list]]:
    """Of each optimizer the points and the losses, under a cosine to 0; no noise."""
    found = {}
    for label, make in _OPTIMIZERS.items():
        x = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
        optimizer = make([x])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        points, losses = [], []
        for _ in range(STEPS + 1):
            loss = valley(x)
            points.append(x.tolist())
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found[label] = {"x": points, "loss": losses}
    return found


def write(path: Path) -> None:
    """The trajectories as JSON, and what they end at in a line each."""
    found = trajectories()
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    for label, run in found.items():
        print(f"toy: {label} ends at a loss of {run['loss'][-1]:.3g}")
