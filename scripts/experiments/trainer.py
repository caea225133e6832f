"""Megatron's trainer with one enlarged gradient: `--burst-at ITERATION --burst FACTOR`."""

import runpy
import sys

import megatron_s3
from megatron_s3.launch import lock
from tests.harness.forks import TRAINER
from tests.harness.gradients import change_gradients

__all__ = ["main"]


def main() -> None:
    """Trains like megatron_s3.pretrain_gpt, but multiplies all gradients of one iteration."""
    at, factor = int(_taken("--burst-at", "0")), float(_taken("--burst", "1"))
    if at and factor != 1:
        megatron_s3.register("auto")
        change_gradients(lambda grads: grads.mul_(factor), at, at, reduced=True)
    runpy.run_module(TRAINER, run_name="__main__", alter_sys=True)


def _taken(flag: str, default: str) -> str:
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
