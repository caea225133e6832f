"""Replaces functions that modules imported by name before the functions were wrapped."""

import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from types import CellType, FrameType, FunctionType, ModuleType
from typing import Any

__all__ = ["Pair", "rebind", "unreached"]

#: A function of Megatron, and the wrapper that replaces it.
Pair = tuple[Callable[..., Any], Callable[..., Any]]


def rebind(pairs: Sequence[Pair]) -> None:
    """Replaces each function by its wrapper in every module that has imported the function.

    Any module may contain ``from megatron... import function``: Megatron's own modules, those of
    another framework, or the running script.
    """
    wrappers = {id(function): wrapper for function, wrapper in pairs}
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                if id(value) in wrappers:
                    setattr(module, name, wrappers[id(value)])


def unreached(pairs: Sequence[Pair]) -> list[str]:
    """Returns a text for each function to which references remain, with what holds them.

    Args:
        pairs: functions and wrappers that were given to :func:`rebind`.
    """
    # One pass over all objects: it takes a good part of the start of a process.
    functions = tuple(function for function, _ in pairs)
    ours = {id(functions), *map(id, pairs)}
    holders: dict[int, list[Any]] = {id(function): [] for function in functions}
    for holder in gc.get_referrers(*functions):
        if not isinstance(holder, FrameType) and id(holder) not in ours:
            for held in {id(each) for each in gc.get_referents(holder)} & holders.keys():
                holders[held].append(holder)
    texts = []
    for function, wrapper in pairs:
        expected = {id(vars(wrapper)), *map(id, wrapper.__closure__ or ())}
        found = [
            _described(holder, function)
            for holder in holders[id(function)]
            if id(holder) not in expected
        ]
        if found:
            name = f"{function.__module__}.{function.__qualname__}"
            texts.append(f"{name} is still held by {_listed(found)}")
    return texts


def _described(holder: Any, function: Callable[..., Any]) -> str:
    if isinstance(holder, dict):
        names = sorted(str(name) for name, value in holder.items() if value is function)
        return f"a dict ({', '.join(names)})"
    if isinstance(holder, CellType):
        users = [
            user.__qualname__
            for user in gc.get_referrers(holder)
            for user in (gc.get_referrers(user) if isinstance(user, tuple) else ())
            if isinstance(user, FunctionType)
        ]
        return f"a variable of {_listed(users) if users else 'a function'}"
    return f"a {type(holder).__name__}"


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))
