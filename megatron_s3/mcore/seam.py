"""Seams: things of Megatron's that are wrapped or replaced, and how they are checked."""

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

#: Releases of Megatron-LM on which every seam was trained, saved and resumed through.
CHECKED_RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.0", "0.19.2", "main of 2026-08-22")

MARK = "__megatron_s3_seam__"


class SeamMoved(MegatronS3Error, RuntimeError):
    """Something that the plugin wraps or replaces is missing, or is not as it is known."""


@dataclass(frozen=True)
class Seam:
    """Something of Megatron's that the plugin changes.

    Attributes:
        module: where it is defined.
        name: its name there, ``Class.method`` for a method.
        purpose: what the change does, and so what is missing without it.
    """

    module: str
    name: str
    purpose: str

    def is_here(self, has_training: bool) -> bool:
        """Returns whether the installed Megatron has to have it."""
        return has_training or not self.module.startswith("megatron.training")

    def check(self) -> None:
        """Raises SeamMoved if it is missing, or is not as it is known."""
        raise NotImplementedError

    def install(self) -> Pair | None:
        """Puts the change in place; once is enough.

        Returns:
            A function of a module, and what replaced it now, if other modules may hold it.
        """
        return None

    def owner(self) -> Any:
        """Returns the module or the class that holds it."""
        try:
            path = self.name.split(".")[:-1]
            return functools.reduce(getattr, path, importlib.import_module(self.module))
        except AttributeError:
            raise self.moved("is not there") from None

    def found(self) -> Any:
        """Returns what stands under its name now."""
        try:
            return getattr(self.owner(), self.name.rpartition(".")[2])
        except AttributeError:
            raise self.moved("is not there") from None

    def expected(self) -> str:
        """Returns in words how it is known."""
        raise NotImplementedError

    def moved(self, fault: str) -> SeamMoved:
        """Returns the error that names it."""
        try:
            release = "megatron-core " + importlib.metadata.version("megatron-core")
        except importlib.metadata.PackageNotFoundError:
            release = "this Megatron-LM tree"
        return SeamMoved(
            f"{self.module}.{self.name} {fault} in {release}, where megatron_s3 expects "
            f"{self.expected()}. It {self.purpose}. Nothing was wrapped. Use one of the releases "
            f"the plugin was checked on ({', '.join(CHECKED_RELEASES)}), or a newer megatron_s3."
        )


@dataclass(frozen=True)
class Wrapped(Seam):
    """A function of Megatron's that another is put around.

    Attributes:
        parameters: the names its leading parameters must have.
        wrapper: called with the original, then the call's own arguments.
        optional: a release may lack the module, and so has nothing to wrap.
    """

    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]
    optional: bool = False

    def is_here(self, has_training: bool) -> bool:
        """Returns whether it has to be there; an optional one does if its module is there."""
        here = super().is_here(has_training)
        return here and (not self.optional or importlib.util.find_spec(self.module) is not None)

    def expected(self) -> str:
        """Returns its parameters."""
        return f"it to take ({', '.join((*self.parameters, '...'))})"

    def check(self) -> None:
        """Raises SeamMoved if it is missing, or takes other parameters."""
        parameters = tuple(inspect.signature(self.found()).parameters)
        if parameters[: len(self.parameters)] != self.parameters:
            raise self.moved(f"takes ({', '.join(parameters)})")

    def install(self) -> Pair | None:
        """Wraps it where it is defined; does nothing where that was done."""
        owner, original = self.owner(), self.found()
        if hasattr(original, MARK):
            return None

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self.wrapper(original, *args, **kwargs)

        setattr(wrapped, MARK, self)
        static = isinstance(inspect.getattr_static(owner, original.__name__, None), staticmethod)
        setattr(owner, original.__name__, staticmethod(wrapped) if static else wrapped)
        # A builtin is held everywhere, and wrapped for one module alone.
        is_own = isinstance(owner, ModuleType) and inspect.isfunction(original)
        return (original, wrapped) if is_own else None


@dataclass(frozen=True)
class Builtin(Wrapped):
    """A builtin of Python's, wrapped as a name of the module of Megatron's that uses it."""

    def found(self) -> Any:
        """Returns what the module uses under the name."""
        return getattr(self.owner(), self.name, None) or getattr(builtins, self.name)

    def check(self) -> None:
        """Raises SeamMoved if the module does not use it any more."""
        tree = ast.parse(inspect.getsource(self.owner()))
        if not any(isinstance(node, ast.Name) and node.id == self.name for node in ast.walk(tree)):
            raise self.moved("is not used")
        super().check()


@dataclass(frozen=True)
class Extended(Seam):
    """A dataclass of Megatron's that gets further fields.

    Attributes:
        extend: called with it; once is enough.
    """

    extend: Callable[[type], None]

    def expected(self) -> str:
        """Returns what it is known by."""
        return "a dataclass with optimizer and clip_grad"

    def check(self) -> None:
        """Raises SeamMoved if it is missing, or no such dataclass."""
        cls = self.found()
        names = {each.name for each in fields(cls)} if is_dataclass(cls) else set()
        if not {"optimizer", "clip_grad"} <= names:
            raise self.moved("is another")

    def install(self) -> None:
        """Adds the fields to it and to its subclasses."""
        self.extend(self.found())


@dataclass(frozen=True)
class Replaced(Seam):
    """A value, class or attribute of Megatron's that another takes the place of.

    Attributes:
        by: the function of this package that replaces it, ``module.function``.
        shape: in words how it is known.
        fits: called with what stands there now; whether that is as it is known.
        needed: whether the installed release is one of those in which it is replaced.
    """

    by: str
    shape: str
    fits: Callable[[Any], bool]
    needed: Callable[[], bool] = lambda: True

    def is_here(self, has_training: bool) -> bool:
        """Returns whether it has to be there, in a release in which it is replaced."""
        return super().is_here(has_training) and self.needed()

    def expected(self) -> str:
        """Returns its shape."""
        return self.shape

    def check(self) -> None:
        """Raises SeamMoved if it is missing, or is not as it is known."""
        if not self.fits(self.found()):
            raise self.moved("is another")
