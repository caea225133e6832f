"""Registration without a line of code: when a process imports Megatron, if its environment asks.

With ``MEGATRON_S3=1`` in the environment, :func:`start` puts a finder in front of Python's own.  It
hands every import of ``megatron...`` on, and calls :func:`megatron_s3.register` when the outermost
of them has ended, so that what a program then takes from Megatron's modules is the plugin's
wrapper.  A process that never imports Megatron pays for the finder alone.

``megatron-s3 hook install`` adds a file to the environment's packages that makes each Python
process start this if the variable is set; verl starts it by its entry points.
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

#: The environment variable that asks for it.
VARIABLE = "MEGATRON_S3"

#: What Python runs at the start of each process, in a file of this name.
_NAME = "megatron_s3_hook.pth"
_LINE = (
    f"import os; os.environ.get({VARIABLE!r}, '0') != '0' and "
    "__import__('megatron_s3.autoregister').autoregister.start()\n"
)

#: With one of these the plugin has something to do.
_ASKS = ("megatron.core.optimizer", "megatron.core.dist_checkpointing", "megatron.training")


class HookError(MegatronS3Error, ValueError):
    """The environment variable has a value that means nothing."""


class _Finder(importlib.abc.MetaPathFinder):
    """Finds Megatron's modules as Python's own finders do, and watches them being imported."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._registered = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns what the other finders find, with a loader that is watched."""
        if self._registered or name.partition(".")[0] != "megatron":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:  # else it is a namespace
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
            _select_device()
        self._here.depth = depth + 1
        try:
            execute()
        finally:
            self._here.depth = depth
        if depth == 0 and not self._registered and any(name in sys.modules for name in _ASKS):
            self._registered = True
            from megatron_s3 import register

            register()


def _select_device() -> None:
    """Chooses the device if one is asked for: Megatron looks at torch.cuda while it is imported."""
    from megatron_s3.mcore import cpu_device, registration

    device = registration.asked_device()
    if device is not None:
        cpu_device.select(device)


def start() -> None:
    """Watches for Megatron in this process, if the environment asks for it; once is enough.

    Raises:
        HookError: when Megatron is imported, if the variable is neither 0 nor 1.
    """
    asked = os.environ.get(VARIABLE, "0")
    if asked == "0" or any(isinstance(finder, _Finder | _Refusal) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder() if asked == "1" else _Refusal())


class _Refusal(importlib.abc.MetaPathFinder):
    """Refuses Megatron's modules: at the start of a process Python would ignore an error."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        """Raises HookError for Megatron."""
        if name.partition(".")[0] == "megatron":
            raise HookError(
                f"{VARIABLE}={os.environ.get(VARIABLE)}: expected 1, which registers megatron_s3 "
                "when Megatron is imported, or 0; change or unset it"
            )


def file() -> Path:
    """Returns the path of the file that starts this in each process of the environment."""
    return Path(sysconfig.get_path("purelib")) / _NAME


def main(argv: list[str] | None = None) -> int:
    """Installs, removes or describes the hook.

    Returns:
        0, or 1 if ``status`` finds no hook.
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
    if action == "install":
        part = path.with_name(f".{path.name}.part")
        part.write_text(_LINE)
        part.replace(path)
        say_here(f"{path} written: {VARIABLE}=1 registers the plugin in each process from now on")
    elif action == "remove":
        path.unlink(missing_ok=True)
        say_here(f"{path} is removed")
    else:
        there = path.is_file() and path.read_text() == _LINE
        say_here(f"{path} {'is installed' if there else 'is not installed'}")
        return 0 if there else 1
    return 0
