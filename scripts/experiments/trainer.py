"""Megatron's trainer, disturbed: `--burst-at ITERATION --burst FACTOR` enlarges one gradient.

`--corrupt-at ITERATION --corrupt COUNT` replaces the text of so many batches by random bytes.
"""

import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch

import megatron_s3
from megatron_s3.launch import lock
from tests.harness.forks import TRAINER
from tests.harness.gradients import change_gradients

__all__ = ["main", "taken"]


def main() -> None:
    """Trains like megatron_s3.pretrain_gpt, but disturbs one iteration or several."""
    at, factor = int(taken("--burst-at", "0")), float(taken("--burst", "1"))
    first, count = int(taken("--corrupt-at", "0")), int(float(taken("--corrupt", "0")))
    if count:
        megatron_s3.register("auto")
        _corrupt(first, first + count - 1)
    if at and factor != 1:
        megatron_s3.register("auto")
        change_gradients(lambda grads: grads.mul_(factor), at, at, reduced=True)
    runpy.run_module(TRAINER, run_name="__main__", alter_sys=True)


def _corrupt(first: int, last: int) -> None:
    """Gives the iterations from first to last batches of random bytes."""
    from megatron.training import get_args, training

    original = training.train_step

    def train_step(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now = get_args().curr_iteration + 1

        def corrupted(batches: Any, model: Any) -> Any:
            return forward(iter([_random(next(batches), now)]), model)

        return original(corrupted if first <= now <= last else forward, *args, **kwargs)

    training.train_step = train_step


def _random(batch: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns a batch with other tokens, each of the 256 equally often."""
    shape = batch["tokens"].shape
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (shape[0], shape[1] + 1), generator=random)
    return batch | {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def taken(flag: str, default: str) -> str:
    """Removes a flag from the command line, and returns its value or the default."""
    if flag not in sys.argv:
        return default
    at = sys.argv.index(flag)
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


if __name__ == "__main__":
    lock.join()
    main()
