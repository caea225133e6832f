"""Writers of other programs' logs, of which no full disk ends a training."""

from typing import Any

from megatron_s3.log import say_here

__all__ = ["Careful", "say_without"]


class Careful:
    """Stands for a writer (of TensorBoard's, of Weights & Biases'), and prints its first OSError.

    Args:
        writer: to which every use is handed on.
        name: what it is called when that fails.
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
    """Prints that a log cannot be written, and why."""
    say_here(f"{name} cannot be written: {error.strerror or error}; training goes on without it")
