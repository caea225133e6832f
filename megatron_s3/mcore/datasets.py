"""Megatron's indexed datasets: the format, and the compiled library that reads them."""

import os
import shutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from megatron_s3.mcore.output import quiet

__all__ = ["compile_helpers", "indexed_dataset"]


def indexed_dataset() -> ModuleType:
    """Returns Megatron's module that reads and writes indexed datasets.

    Raises:
        ImportError: Megatron is not installed, or cannot be imported.
    """
    with quiet():
        from megatron.core.datasets import indexed_dataset
    module: ModuleType = indexed_dataset
    return module


def compile_helpers(original: Callable[..., Any]) -> Any:
    """Wraps the compilation of the library that reads datasets; keeps an existing library.

    Megatron calls make and ends the process if make fails. The wheels of 0.17 to 0.19 contain the
    library but no Makefile.
    """
    try:
        import megatron.core.datasets.helpers_cpp as built
    except ImportError:
        return original()
    makefile = os.path.join(os.path.dirname(built.__file__), "Makefile")
    return original() if os.path.exists(makefile) and shutil.which("make") else None
