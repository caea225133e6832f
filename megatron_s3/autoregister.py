"""Registers the plugin without a change of code, when a process imports Megatron.

With ``MEGATRON_S3=1`` in the environment, :func:`start` inserts a finder before Python's own.  The
finder passes every import of ``megatron...`` on to the others, and calls
:func:`megatron_s3.register` after the outermost import, so that the program then receives the
plugin's wrappers from Megatron's modules.  In a process that never imports Megatron, the finder
does nothing.

``megatron-s3 hook install`` adds a file to the environment's packages that calls :func:`start` in
each Python process if the variable is set.  verl calls it through its entry points.
"""

import argparse
import importlib.abc
import importlib.machinery
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from megatron_s3.errors import MegatronS3Error
from megatron_s3.log import say_here

__all__ = ["VARIABLE", "HookError", "file", "main", "start"]

#: The environment variable that turns the registration on.
VARIABLE = "MEGATRON_S3"

#: The file that the hook adds, and its line, which Python runs at the start of each process.
_NAME = "megatron_s3_hook.pth"
_LINE = (
    f"import os; os.environ.get({VARIABLE!r}, '0') != '0' and "
    "__import__('megatron_s3.autoregister').autoregister.start()\n"
)

#: The plugin is registered when one of these modules has been imported.
_ASKS = ("megatron.core.optimizer", "megatron.core.dist_checkpointing", "megatron.training")


class HookError(MegatronS3Error, ValueError):
    """Raised if the environment variable is neither 0 nor 1, or the hook cannot be changed."""


class _Finder(importlib.abc.MetaPathFinder):
    """Finds Megatron's modules with the other finders, and wraps the execution of each module."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._registered = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec that the other finders find, with a wrapped loader."""
        if self._registered or name.partition(".")[0] != "megatron":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:  # None for a namespace package
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: importlib.abc.Loader) -> None:
        original = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._run(lambda: original(module))

        loader.exec_module = exec_module  # type: ignore[method-assign]

    def _run(self, execute: Callable[[], None]) -> None:
        depth = getattr(self._here, "depth", 0)
        if depth == 0 and not self._registered:
            from megatron_s3.mcore import registration

            registration.select_device()
        self._here.depth = depth + 1
        try:
            execute()
        finally:
            self._here.depth = depth
        if depth == 0 and not self._registered and any(name in sys.modules for name in _ASKS):
            self._registered = True
            from megatron_s3 import register

            register()


def start() -> None:
    """Inserts the finder if the environment variable is set.  Another call has no effect.

    If the variable is neither 0 nor 1, importing Megatron raises HookError.
    """
    asked = os.environ.get(VARIABLE, "0")
    if asked == "0" or any(isinstance(finder, _Finder | _Refusal) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder() if asked == "1" else _Refusal())


class _Refusal(importlib.abc.MetaPathFinder):
    """Raises the error when Megatron is imported.

    Python ignores errors of the hook at the start of a process, so it cannot be raised there.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        """Raises HookError for Megatron's modules."""
        if name.partition(".")[0] == "megatron":
            raise HookError(
                f"{VARIABLE}={os.environ.get(VARIABLE)}: expected 1, which registers megatron_s3 "
                "when Megatron is imported, or 0; change or unset it"
            )


def file() -> Path:
    """Returns the path of the file that calls :func:`start` in each process."""
    return Path(sysconfig.get_path("purelib")) / _NAME


def main(argv: list[str] | None = None) -> int:
    """Installs, removes or describes the hook.

    Returns:
        0, or 1 if ``status`` finds no hook.

    Raises:
        HookError: the environment's packages cannot be changed.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-s3 hook",
        description=f"With the hook installed, {VARIABLE}=1 in the environment of a process "
        "registers the plugin when the process imports Megatron. Without the variable the hook "
        "does nothing.",
    )
    parser.add_argument(
        "action",
        choices=("install", "remove", "status"),
        help="install writes one file to the environment's packages, and remove deletes it; "
        "status tells whether it is there",
    )
    action = parser.parse_args(argv).action
    path = file()
    if action == "status":
        there = path.is_file() and path.read_text() == _LINE
        say_here(f"{path} {'is installed' if there else 'is not installed'}")
        return 0 if there else 1
    try:
        if action == "install":
            part = path.with_name(f".{path.name}.part")
            part.write_text(_LINE)
            part.replace(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise HookError(
            f"{path} cannot be changed ({error.strerror}). Use an environment whose packages you "
            "may change, or call megatron_s3.register() in the program."
        ) from None
    what = f"written: {VARIABLE}=1 registers the plugin in each process from now on"
    say_here(f"{path} {what if action == 'install' else 'is removed'}")
    return 0
