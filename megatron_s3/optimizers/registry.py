"""Registry of optimizers by name: the plugin's, and those of other packages."""

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from megatron_s3.errors import MegatronS3Error

__all__ = ["ENTRY_POINTS", "OPTIMIZERS", "EntryPointError", "register"]

#: The group of entry points with which a package names modules that register optimizers.
ENTRY_POINTS = "megatron_s3.optimizers"

Class = TypeVar("Class", bound=type[Any])


class EntryPointError(MegatronS3Error, ImportError):
    """Raised if the entry point of an installed package cannot be loaded."""


class _Registry(Mapping[str, type[Any]]):
    """The registered classes; entry points are loaded at the first access.

    They are subclasses of ElementwiseOptimizer, which reads this registry.
    """

    def __init__(self) -> None:
        self._classes: dict[str, type[Any]] = {}
        self._looked = False

    def add(self, cls: type[Any]) -> None:
        name = cls.description.name
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(
                f"{cls.__qualname__}: {name!r} cannot be the name of an optimizer: it becomes a "
                "part of flags and keys, and has to be a letter a-z followed by a-z, 0-9 and _"
            )
        known = self._classes.get(name)
        if known is not None and _place(known) != _place(cls):
            raise ValueError(
                f"{_place(cls)}: the name {name!r} is taken by {_place(known)}; give its "
                "description another one"
            )
        for other in self._classes.values():
            same = _keys(cls) & _keys(other)
            if other.description.name != name and same:
                raise ValueError(
                    f"{_place(cls)}: its {min(same)} would also be one of {_place(other)}, with "
                    "the same flag; give its description or its hyperparameter another name"
                )
        self._classes[name] = cls

    def _look(self) -> dict[str, type[Any]]:
        if not self._looked:
            self._looked = True  # an imported module may access the registry, too
            for point in entry_points(group=ENTRY_POINTS):
                try:
                    loaded = point.load()
                    if isinstance(loaded, type) and loaded not in self._classes.values():
                        raise TypeError(f"{_place(loaded)} lacks the decorator @register")
                except (Exception, SystemExit) as error:
                    self._looked = False
                    raise EntryPointError(
                        f"the entry point {point.name} = {point.value} of {ENTRY_POINTS} cannot be "
                        f"loaded ({type(error).__name__}: {error}); fix or uninstall "
                        f"{point.dist.name if point.dist else 'its package'}"
                    ) from error
        return self._classes

    def __getitem__(self, name: str) -> type[Any]:
        found = self._classes.get(name)
        return self._look()[name] if found is None else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._look())

    def __len__(self) -> int:
        return len(self._look())


def _keys(cls: type[Any]) -> set[str]:
    """Returns the keys of Megatron's arguments that an optimizer's hyperparameters have."""
    return {f"{cls.description.name}_{h.name}" for h in cls.description.hyperparameters}


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


#: Optimizers by the name that ``--optimizer`` takes.
OPTIMIZERS = _Registry()


def register(cls: Class) -> Class:
    """Registers an optimizer's class under its description's name; a class decorator.

    Other packages register optimizers with entry points in the group ``megatron_s3.optimizers``,
    each of which names a module (or a class in it).  The module is imported at the first access to
    the optimizers.

    Raises:
        ValueError: the name belongs to another class or is invalid, or a flag of its would be that
            of another optimizer.
    """
    OPTIMIZERS.add(cls)
    return cls
