"""Seams: the functions and classes of Megatron that the plugin patches, and their checks."""

import ast
import builtins
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from types import ModuleType
from typing import Any

from megatron_s3.errors import MegatronS3Error
from megatron_s3.mcore.rebinding import Pair

__all__ = ["CHECKED_RELEASES", "Builtin", "Extended", "Replaced", "Seam", "SeamMoved", "Wrapped"]

#: Releases of Megatron-LM on which training, saving and resuming were tested with every seam.
CHECKED_RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.0", "0.19.2", "main of 2026-08-22")

MARK = "__megatron_s3_seam__"


class SeamMoved(MegatronS3Error, RuntimeError):
    """Raised if something that the plugin patches is missing or differs from what is expected."""


@dataclass(frozen=True)
class Seam:
    """A function, class or value of Megatron that the plugin changes.

    Attributes:
        module: the module that defines it.
        name: its name in that module; ``Class.method`` for a method.
        purpose: what the change does, as a phrase that begins with a verb.
    """

    module: str
    name: str
    purpose: str

    def is_here(self, has_training: bool) -> bool:
        """Returns whether the installed Megatron must contain it."""
        return has_training or not self.module.startswith("megatron.training")

    def check(self) -> None:
        """Raises SeamMoved if it is missing or differs from what is expected."""
        raise NotImplementedError

    def install(self) -> Pair | None:
        """Makes the change.  Another call has no effect.

        Returns:
            The original function and its wrapper, if other modules may have imported the function
            by name; otherwise None.
        """
        return None

    def owner(self) -> Any:
        """Returns the module or class in which it is defined."""
        try:
            path = self.name.split(".")[:-1]
            return functools.reduce(getattr, path, importlib.import_module(self.module))
        except AttributeError:
            raise self.moved("is missing") from None

    def found(self) -> Any:
        """Returns the present value of its name."""
        try:
            return getattr(self.owner(), self.name.rpartition(".")[2])
        except AttributeError:
            raise self.moved("is missing") from None

    def expected(self) -> str:
        """Returns a description of what is expected, for the error message."""
        raise NotImplementedError

    def moved(self, fault: str) -> SeamMoved:
        """Returns the error to raise if the check fails.

        Args:
            fault: what is wrong, as a phrase that begins with a verb.
        """
        try:
            release = "megatron-core " + importlib.metadata.version("megatron-core")
        except importlib.metadata.PackageNotFoundError:
            release = "this Megatron-LM tree"
        return SeamMoved(
            f"{self.module}.{self.name} {fault} in {release}; megatron_s3 expects "
            f"{self.expected()}. The plugin's version {self.purpose}. Nothing was wrapped. Use a "
            f"release with which the plugin was tested ({', '.join(CHECKED_RELEASES)}), or a newer "
            "megatron_s3."
        )


@dataclass(frozen=True)
class Wrapped(Seam):
    """A function of Megatron that the plugin wraps.

    Attributes:
        parameters: the names that its first parameters must have.
        wrapper: called with the original function, followed by the arguments of the call.
        optional: whether some releases lack the module; there, nothing is wrapped.
    """

    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]
    optional: bool = False

    def is_here(self, has_training: bool) -> bool:
        """Returns whether Megatron must contain it; if optional, only where its module exists."""
        here = super().is_here(has_training)
        return here and (not self.optional or importlib.util.find_spec(self.module) is not None)

    def expected(self) -> str:
        """Returns the expected parameters."""
        return f"it to take ({', '.join((*self.parameters, '...'))})"

    def check(self) -> None:
        """Raises SeamMoved if it is missing or takes other parameters."""
        parameters = tuple(inspect.signature(self.found()).parameters)
        if parameters[: len(self.parameters)] != self.parameters:
            raise self.moved(f"takes ({', '.join(parameters)})")

    def install(self) -> Pair | None:
        """Wraps it in the module or class that defines it, unless it is wrapped already."""
        owner, original = self.owner(), self.found()
        if hasattr(original, MARK):
            return None

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self.wrapper(original, *args, **kwargs)

        setattr(wrapped, MARK, self)
        name = self.name.rpartition(".")[2]  # another wrapper may be called otherwise
        static = isinstance(inspect.getattr_static(owner, name, None), staticmethod)
        setattr(owner, name, staticmethod(wrapped) if static else wrapped)
        # A builtin is used everywhere, but is wrapped for one module only.
        is_own = isinstance(owner, ModuleType) and inspect.isfunction(original)
        return (original, wrapped) if is_own else None


@dataclass(frozen=True)
class Builtin(Wrapped):
    """A Python builtin, wrapped only for the module of Megatron that uses it."""

    def found(self) -> Any:
        """Returns the function that the module calls by this name."""
        return getattr(self.owner(), self.name, None) or getattr(builtins, self.name)

    def check(self) -> None:
        """Raises SeamMoved if the module no longer uses it."""
        tree = ast.parse(inspect.getsource(self.owner()))
        if not any(isinstance(node, ast.Name) and node.id == self.name for node in ast.walk(tree)):
            raise self.moved("is not used")
        super().check()


@dataclass(frozen=True)
class Extended(Seam):
    """A dataclass of Megatron to which the plugin adds fields.

    Attributes:
        extend: adds the fields to the class; another call has no effect.
    """

    extend: Callable[[type], None]

    def expected(self) -> str:
        """Returns what the class must be."""
        return "a dataclass with optimizer and clip_grad"

    def check(self) -> None:
        """Raises SeamMoved if it is missing or is not such a dataclass."""
        cls = self.found()
        names = {each.name for each in fields(cls)} if is_dataclass(cls) else set()
        if not {"optimizer", "clip_grad"} <= names:
            raise self.moved("is not as expected")

    def install(self) -> None:
        """Adds the fields to the class and its subclasses."""
        self.extend(self.found())


@dataclass(frozen=True)
class Replaced(Seam):
    """A value, class or attribute of Megatron that the plugin replaces.

    Attributes:
        by: the function of this package that replaces it, ``module.function``.
        shape: a description of what is expected, for the error message.
        fits: returns whether the present value is as expected.
        needed: returns whether the plugin replaces it in the installed release.
    """

    by: str
    shape: str
    fits: Callable[[Any], bool]
    needed: Callable[[], bool] = lambda: True

    def is_here(self, has_training: bool) -> bool:
        """Returns whether Megatron must contain it, and the plugin replaces it in this release."""
        return super().is_here(has_training) and self.needed()

    def expected(self) -> str:
        """Returns the description of what is expected."""
        return self.shape

    def check(self) -> None:
        """Raises SeamMoved if it is missing or differs from what is expected."""
        if not self.fits(self.found()):
            raise self.moved("is not as expected")
