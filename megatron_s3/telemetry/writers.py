"""Wrappers of TensorBoard's and other writers, so that a full disk does not end a training."""

from typing import Any

from megatron_s3.log import say_here

__all__ = ["Careful", "say_without"]


class Careful:
    """A wrapper of a writer (TensorBoard's or Weights & Biases') that prints its first OSError.

    Args:
        writer: the writer to which every call is forwarded.
        name: the name of its log in the printed line.
    """

    def __init__(self, writer: Any, name: str) -> None:
        self._writer = writer
        self._name = name
        self._failed = False

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._writer, attribute)
        if not callable(found):
            return found

        def careful(*args: Any, **kwargs: Any) -> Any:
            try:
                return found(*args, **kwargs)
            except OSError as error:
                self._fail(error)
                return None

        return careful

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            say_without(self._name, error)
        self._failed = True


def say_without(name: str, error: OSError) -> None:
    """Prints that a log cannot be written, with the reason."""
    say_here(f"{name} cannot be written: {error.strerror or error}; training goes on without it")
