"""Shows the name "adam" to Megatron while it validates and builds an optimizer of the plugin.

Megatron treats every optimizer other than adam and sgd as a layer-wise one, and turns the
distributed optimizer off for it.  What works for Adam works for any element-wise optimizer.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["as_adam", "print_args", "replaced"]


class _Adam(str):
    """A string that equals "adam" and remembers the name of the chosen optimizer."""

    asked: str

    def __repr__(self) -> str:
        return repr(self.asked)  # because Megatron logs the configuration while it builds


@contextlib.contextmanager
def as_adam(holder: Any) -> Iterator[None]:
    """Makes ``holder.optimizer`` equal "adam" inside a ``with`` block."""
    name = _Adam("adam")
    name.asked = holder.optimizer
    with replaced(holder, {"optimizer": name}):
        yield


@contextlib.contextmanager
def replaced(holder: Any, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Replaces attributes of ``holder`` inside a ``with`` block.

    Args:
        holder: the object.
        values: new values by name; names that the object lacks are skipped.

    Yields:
        The original values by name.
    """
    own = {name: getattr(holder, name) for name in values if hasattr(holder, name)}
    for name in own:
        setattr(holder, name, values[name])
    try:
        yield own
    finally:
        for name, value in own.items():
            setattr(holder, name, value)


def print_args(original: Callable[..., Any], title: str, args: argparse.Namespace) -> Any:
    """Wraps Megatron's printing of its arguments: shows the real name of the optimizer."""
    shown = argparse.Namespace(**vars(args))
    shown.optimizer = getattr(args.optimizer, "asked", args.optimizer)
    return original(title, shown)
