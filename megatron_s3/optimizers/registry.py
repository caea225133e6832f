"""The optimizers by their names: the plugin's, and those of other packages."""

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from megatron_s3.errors import MegatronS3Error
from megatron_s3.optimizers.base import ElementwiseOptimizer

__all__ = ["ENTRY_POINTS", "OPTIMIZERS", "EntryPointError", "register"]

#: The group of entry points under which a package announces modules that register optimizers.
ENTRY_POINTS = "megatron_s3.optimizers"

Class = TypeVar("Class", bound=type[ElementwiseOptimizer])


class EntryPointError(MegatronS3Error, ImportError):
    """Raised where what an installed package announces cannot be imported."""


class _Registry(Mapping[str, type[ElementwiseOptimizer]]):
    """The registered classes; what installed packages announce is imported at the first look."""

    def __init__(self) -> None:
        self._classes: dict[str, type[ElementwiseOptimizer]] = {}
        self._looked = False

    def add(self, cls: type[ElementwiseOptimizer]) -> None:
        name = cls.description.name
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(
                f"{cls.__qualname__}: {name!r} cannot be the name of an optimizer: it becomes a "
                "part of flags and of keys, and has to be of a-z, 0-9 and _"
            )
        known = self._classes.get(name)
        if known is not None and _place(known) != _place(cls):
            raise ValueError(
                f"{_place(cls)}: the name {name!r} is taken by {_place(known)}; give its "
                "description another one"
            )
        self._classes[name] = cls

    def _look(self) -> dict[str, type[ElementwiseOptimizer]]:
        if not self._looked:
            self._looked = True  # what is imported may look, too
            for point in entry_points(group=ENTRY_POINTS):
                try:
                    point.load()
                except Exception as error:
                    self._looked = False
                    raise EntryPointError(
                        f"the entry point {point.name} = {point.value} of {ENTRY_POINTS} cannot be "
                        f"loaded ({type(error).__name__}: {error}); mend or uninstall "
                        f"{point.dist.name if point.dist else 'its package'}"
                    ) from error
        return self._classes

    def __getitem__(self, name: str) -> type[ElementwiseOptimizer]:
        found = self._classes.get(name)
        return self._look()[name] if found is None else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._look())

    def __len__(self) -> int:
        return len(self._look())


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


#: Optimizers by the name that ``--optimizer`` takes.
OPTIMIZERS = _Registry()


def register(cls: Class) -> Class:
    """Makes an optimizer known under its description's name; a decorator of the class.

    A package whose entry points in the group ``megatron_s3.optimizers`` name a module (or a class
    in it) is imported when the optimizers are first asked for, so that ``megatron-s3`` knows what
    that module registers, too.

    Raises:
        ValueError: the name is taken by another class, or cannot be a name.
    """
    OPTIMIZERS.add(cls)
    return cls
