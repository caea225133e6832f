"""Megatron's trainer with one gradient that is too large: `--burst-at ITERATION --burst FACTOR`."""

import sys
from typing import Any

__all__ = ["main"]


def main() -> None:
    """Trains as megatron_s3.pretrain_gpt does; in one iteration all gradients are multiplied."""
    import runpy

    at, factor = int(_taken("--burst-at", "0")), float(_taken("--burst", "1"))
    if at and factor != 1:
        _wrap(at, factor)
    runpy.run_module("megatron_s3.pretrain_gpt", run_name="__main__", alter_sys=True)


def _taken(flag: str, default: str) -> str:
    """Takes a flag and its value out of the command line."""
    if flag not in sys.argv:
        return default
    at = sys.argv.index(flag)
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


def _wrap(at: int, factor: float) -> None:
    """Around what ends a backward pass: gradients are reduced by then, and not yet read."""
    import megatron_s3

    megatron_s3.register()
    from megatron.training import get_args, training

    original = training.finalize_model_grads

    def finalize_model_grads(model: list[Any], *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        if get_args().curr_iteration + 1 == at:
            for chunk in model:
                for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                    buffer.grad_data.mul_(factor)
        return result

    training.finalize_model_grads = finalize_model_grads


if __name__ == "__main__":
    from megatron_s3.launch import lock

    lock.join()
    main()
