"""Megatron's trainer, disturbed.

`--burst-at ITERATION --burst FACTOR` enlarges one gradient, of the last rank if there are several.
`--replace-at ITERATION --replace COUNT --by random|cpp` replaces the text of so many batches by
random bytes, or by C++.
"""

import functools
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import megatron_s3
from megatron_s3.launch import lock
from tests.harness.forks import TRAINER
from tests.harness.gradients import change_gradients

__all__ = ["main", "taken"]

#: Bytes of C++ from which batches are taken.
_CPP = 4_000_000


def main() -> None:
    """Trains like megatron_s3.pretrain_gpt, but disturbs one iteration or several."""
    at, factor = int(taken("--burst-at", "0")), float(taken("--burst", "1"))
    first, count = int(taken("--replace-at", "0")), int(float(taken("--replace", "0")))
    by = {"random": _random, "cpp": _cpp}[taken("--by", "random")]
    if count:
        megatron_s3.register("auto")
        _replace(first, first + count - 1, by)
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if at and factor != 1 and rank == ranks - 1:
        megatron_s3.register("auto")
        change_gradients(lambda grads: grads.mul_(factor), at, at, reduced=ranks == 1)
    runpy.run_module(TRAINER, run_name="__main__", alter_sys=True)


def _replace(first: int, last: int, other: Callable[[dict[str, Any], int], dict[str, Any]]) -> None:
    """Gives the iterations from first to last other batches."""
    from megatron.training import get_args, training

    original = training.train_step

    def train_step(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now = get_args().curr_iteration + 1

        def replaced(batches: Any, model: Any) -> Any:
            return forward(iter([other(next(batches), now)]), model)

        return original(replaced if first <= now <= last else forward, *args, **kwargs)

    training.train_step = train_step


def _random(batch: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns a batch with other tokens, each of the 256 equally often."""
    shape = batch["tokens"].shape
    random = torch.Generator().manual_seed(seed)
    return _of(batch, torch.randint(256, (shape[0], shape[1] + 1), generator=random))


def _cpp(batch: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns a batch with the bytes of C++ headers, those of torch."""
    samples, length = batch["tokens"].shape
    random = torch.Generator().manual_seed(seed)
    begins = torch.randint(len(_headers()) - length, (samples,), generator=random)
    return _of(batch, torch.stack([_headers()[k : k + length + 1] for k in begins.tolist()]))


@functools.cache
def _headers() -> torch.Tensor:
    text = bytearray()
    for path in sorted(Path(torch.__file__).with_name("include").glob("ATen/**/*.h")):
        text += path.read_bytes()
        if len(text) >= _CPP:
            break
    return torch.frombuffer(text, dtype=torch.uint8).long()


def _of(batch: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
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
