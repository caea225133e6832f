"""Stand-ins for what Megatron-Bridge imports, and a machine without a GPU does not have.

- Packages (:data:`PACKAGES`): their names are given to Bridge's own modules alone, while these are
  imported, as empty classes and functions.  megatron-core and all others see no such package.
- ``megatron.bridge.diffusion``, of models that nothing here trains.
"""

import builtins
import contextlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["PACKAGES", "standing_in"]

#: What is imported by Bridge's modules for training language models, and not installed here.
PACKAGES = (
    "megatron.energon",
    "modelopt",
    "nvdlfw_inspect",
    "nvidia_resiliency_ext",
    "toml",
    "transformer_engine",
    "webdataset",
)

_LEFT_OUT = "megatron.bridge.diffusion"


class _StandIn(types.ModuleType):
    """A module that has every name: classes if they begin with a capital, else more of its kind."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        subscripted = {"__class_getitem__": classmethod(lambda cls, item: cls)}
        return type(name, (), subscripted) if name[0].isupper() else _StandIn(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Does what a decorator does; returns None to others."""
        return args[0] if len(args) == 1 and callable(args[0]) else None


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Lets the modules of Bridge that are imported inside a ``with`` import the stand-ins."""
    original = builtins.__import__

    def stand_in(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> Any:
        if (globals or {}).get("__name__", "").startswith("megatron.bridge"):
            if name.startswith(_LEFT_OUT):
                return _StandIn(name)
            if name.startswith(PACKAGES):
                try:
                    return original(name, globals, locals, fromlist, level)
                except ImportError:
                    return _StandIn(name)
        return original(name, globals, locals, fromlist, level)

    builtins.__import__ = stand_in
    try:
        yield
    finally:
        builtins.__import__ = original
