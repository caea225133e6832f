"""The trainer with something wrong: ``python -m tests.faults.rank HOOK FLAGS ...`` in each rank.

HOOK is VALUE@FROM-TO, gradients on rank 1 in these iterations (nan, inf, 1e30, or x1000 times what
they are), or format=NUMBER, checkpoints as another version of the plugin saves them.
"""

import argparse
import os
import runpy
import sys
from typing import Any

import torch

from tests.harness.forks import TRAINER
from tests.harness.gradients import change_gradients

__all__: list[str] = []


def main() -> None:
    """Takes the hook from the command line and trains."""
    what, _, when = sys.argv.pop(1).partition("@")
    if not when:
        _stamp(what.partition("=")[2])
    elif os.environ["RANK"] == "1":
        first, last = map(int, when.split("-"))
        change_gradients(lambda grads: _spoil(grads, what), first, last, reduced=False)
    runpy.run_module(TRAINER, run_name="__main__", alter_sys=True)


def _spoil(grads: torch.Tensor, what: str) -> None:
    if what.startswith("x"):
        grads.mul_(float(what[1:]))
    else:
        grads[::1009] = float(what)


def _stamp(number: str) -> None:
    """Saves as another version does."""
    from megatron.training import checkpointing

    original = checkpointing.generate_state_dict

    def generate_state_dict(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        result = original(args, *rest, **kwargs)
        result["args"] = argparse.Namespace(**vars(args))
        if number == "none":
            del result["args"].s3_format
        else:
            result["args"].s3_format = int(number)
        return result

    checkpointing.generate_state_dict = generate_state_dict


if __name__ == "__main__":
    main()
