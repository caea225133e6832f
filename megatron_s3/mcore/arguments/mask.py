"""The name "adam", which Megatron sees where it validates and builds a plugin's optimizer.

Megatron sends every name it does not treat as adam or sgd to its layer-wise optimizers, and turns
the distributed optimizer off for them; what fits Adam fits any element-wise optimizer.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["as_adam", "print_args", "replaced"]


class _Adam(str):
    """Is "adam" to whoever compares it, and knows the name that was asked for."""

    asked: str

    def __repr__(self) -> str:
        return repr(self.asked)  # Megatron logs the configuration while it builds


@contextlib.contextmanager
def as_adam(holder: Any) -> Iterator[None]:
    """Makes ``holder.optimizer`` read "adam", inside a ``with``."""
    name = holder.optimizer
    holder.optimizer = _Adam("adam")
    holder.optimizer.asked = name
    try:
        yield
    finally:
        holder.optimizer = name


@contextlib.contextmanager
def replaced(holder: Any, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Gives ``holder`` these values of what it has, inside a ``with``; yields its own."""
    own = {name: getattr(holder, name) for name in values if hasattr(holder, name)}
    for name in own:
        setattr(holder, name, values[name])
    try:
        yield own
    finally:
        for name, value in own.items():
            setattr(holder, name, value)


def print_args(original: Callable[..., Any], title: str, args: argparse.Namespace) -> Any:
    """Wraps Megatron's printing of its arguments, which happens behind the mask."""
    shown = argparse.Namespace(**vars(args))
    shown.optimizer = getattr(args.optimizer, "asked", args.optimizer)
    return original(title, shown)
