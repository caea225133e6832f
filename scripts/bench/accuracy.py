#!/usr/bin/env python3
"""Prints the error of S3's updates in fp32, for two representations of the second state.

``root`` is the package's implementation: it stores r = s**(1/p) and takes powers only of ratios.
``raw`` is Algorithm 1 as printed, with s in fp32.  Both are compared with Algorithm 1 in float64,
on heavy-tailed gradients (Student's t with 1 degree of freedom) of each magnitude.  At 1e-36 some
gradients are smaller than the smallest normal number, 1.2e-38.  For ``root``, an element's first
gradients of this size count as 0.
"""

import argparse
import sys

import torch
from torch import Tensor

from megatron_s3.rules.s3 import s3_update
from tests.harness.reference import S3Reference

PS = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
EXPONENTS = (-36, -30, -15, -12, -10, -5, 0, 5, 10, 15, 30, 36)
BETA = 0.95


class Raw:
    """Algorithm 1 as printed, in the dtype of ``like``."""

    def __init__(self, like: Tensor, p: float) -> None:
        self.m, self.s, self.p = torch.zeros_like(like), torch.zeros_like(like), p

    def step(self, grad: Tensor) -> Tensor:
        """Updates the state and returns n / b, or 0 where b is 0."""
        power = grad.abs().pow(self.p)
        self.m = BETA * self.m + (1 - BETA) * grad
        self.s = BETA * self.s + (1 - BETA) * power
        n = BETA * self.m + (1 - BETA) * grad
        b = (BETA * self.s + (1 - BETA) * power).pow(1 / self.p)
        return torch.where(b == 0, 0, n / b)


class Root:
    """The package's update rule."""

    def __init__(self, like: Tensor, p: float) -> None:
        self.m, self.r, self.p = torch.zeros_like(like), torch.zeros_like(like), p

    def step(self, grad: Tensor) -> Tensor:
        """Updates the state and returns u."""
        return s3_update(grad, self.m, self.r, beta=BETA, p=self.p)


class Errors:
    """Accumulates rms and maximum of the error, and the largest update, for each magnitude."""

    def __init__(self) -> None:
        self.squares = torch.zeros(len(EXPONENTS), dtype=torch.float64)
        self.largest, self.update = self.squares.clone(), self.squares.clone()
        self.count = 0

    def add(self, u: Tensor, expected: Tensor) -> None:
        """Adds the updates of one step, of shape (magnitudes, elements)."""
        error = (u.double() - expected).abs()
        self.squares += error.square().mean(1)
        self.largest = torch.maximum(self.largest, error.amax(1))
        self.update = torch.maximum(self.update, u.double().abs().amax(1))
        self.count += 1

    def rows(self) -> dict[str, list[str]]:
        """Returns the figures as text."""
        rms = (self.squares / self.count).sqrt()
        return {
            "rms error": [f"{x:.1e}" for x in rms.tolist()],
            "max error": [f"{x:.1e}" for x in self.largest.tolist()],
            "max |u|": [f"{x:.7f}" if x < 10 else f"{x:.1e}" for x in self.update.tolist()],
        }


def gradients(elements: int, step: int) -> tuple[Tensor, Tensor]:
    """Returns the gradients of a step in fp32, and in float64 scaled to magnitude 1.

    The factor is a power of two, so the product is exact in float64.  n / b does not depend on it,
    and |g|**p stays in the range of float64.
    """
    random = torch.Generator().manual_seed(step)
    ratio = torch.randn(2, elements, generator=random, dtype=torch.float64)
    base = (ratio[0] / ratio[1]).clamp(-1e4, 1e4)
    magnitudes = torch.tensor([10.0**k for k in EXPONENTS], dtype=torch.float64)[:, None]
    largest = torch.finfo(torch.float32).max
    grad = (base * magnitudes).clamp(-largest, largest).float()
    return grad, torch.ldexp(grad.double(), -torch.frexp(magnitudes).exponent)


def measure(p: float, steps: int, elements: int) -> dict[str, Errors]:
    """Returns the errors of both representations for one p."""
    like = torch.zeros(len(EXPONENTS), elements)
    runs = {"root": Root(like, p), "raw": Raw(like, p)}
    errors = {name: Errors() for name in runs}
    exact = S3Reference(like, beta=BETA, p=p)
    for t in range(steps):
        grad, scaled = gradients(elements, t)
        expected = exact.step(scaled, 1.0)
        for name, run in runs.items():
            errors[name].add(run.step(grad), expected)
        if t % 100 == 0:
            print(f"\rp={p:g}: {t}/{steps} steps ", end="", file=sys.stderr)
    return errors


def main() -> None:
    """Parses the arguments and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--elements", type=int, default=256, help="number of elements of each magnitude"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [["p", "state", "figure", *(f"1e{k}" for k in EXPONENTS)]]
    for p in PS:
        for name, errors in measure(p, arguments.steps, arguments.elements).items():
            lines += [[f"{p:g}", name, figure, *row] for figure, row in errors.rows().items()]
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    print(f"n / b in fp32, beta={BETA}, {arguments.steps} steps of {arguments.elements} elements")
    for line in lines:
        print(f"{line[0]:>3} {line[1]:<5} {line[2]:<9}", *(f"{cell:>9}" for cell in line[3:]))


if __name__ == "__main__":
    main()
