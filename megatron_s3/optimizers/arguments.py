"""Constructors of optimizers, whose signatures define the description's hyperparameters.

::

    class Lion(ElementwiseOptimizer):
        @arguments
        def __init__(
            self,
            params: Params,
            lr: Rate = 1e-3,
            *,
            beta1: Annotated[float, About("coefficient of the momentum", 0, 1)] = 0.95,
            **options: Unpack[Options],
        ) -> None: ...
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron_s3.optimizers.description import RESERVED, Hyperparameter

__all__ = ["About", "Options", "Params", "Rate", "arguments", "hyperparameters_of"]

Params = ParamsT
Rate = float | Tensor | None
Constructor = TypeVar("Constructor", bound=Callable[..., None])


class Options(TypedDict, total=False):
    """The arguments that all optimizers have, see ``ElementwiseOptimizer``."""

    weight_decay: float
    error_if_nonfinite: bool
    fused: bool | None
    state_dtype: torch.dtype | Mapping[str, torch.dtype]


_DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "error_if_nonfinite": False,
    "fused": None,
    "state_dtype": torch.float32,
}
#: The arguments of a constructor that are no hyperparameters.
_TAKEN = ("self", "params", "lr")


@dataclass(frozen=True)
class About:
    """The facts about an argument in addition to its name and default.

    Attributes:
        help: one line for ``--help``.
        low: the smallest value allowed.
        high: the smallest value above ``low`` that is not allowed.
        fixes_state: whether a stored state can only be used with the value it was computed with.
    """

    help: str
    low: float = -math.inf
    high: float = math.inf
    fixes_state: bool = False


def arguments(signature: Constructor) -> Constructor:
    """Returns a constructor with this signature that passes its arguments to ``construct``.

    Every keyword that is annotated with :class:`About` is a hyperparameter.  If its default is a
    bool, it is a switch; if its default is None, it is an optional number.  The function's body is
    not run.

    Raises:
        TypeError: an argument cannot be a hyperparameter, or would be ignored.
    """
    own, missing = inspect.signature(signature).parameters, inspect.Parameter.empty
    rate = own["lr"].default if "lr" in own else 1e-3

    @functools.wraps(signature)
    def construct(self: Any, params: Any, lr: Any = rate, **given: Any) -> None:
        if lr is missing:
            raise TypeError(f"{signature.__qualname__} has no default for lr. Pass a learning rate")
        self.construct(params, lr, **given)

    found, shown = [], []
    hints = get_type_hints(signature, include_extras=True)
    for name, parameter in own.items():
        hint = hints.get(name)
        kind, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if about and isinstance(about[0], About):
            found.append(_hyperparameter(signature, parameter, about[0]))
        elif parameter.kind is not inspect.Parameter.VAR_KEYWORD and name not in _TAKEN:
            raise TypeError(
                f"{signature.__qualname__}: {name} would be ignored. Annotate it with About(...) "
                "to make it a hyperparameter, or leave it out"
            )
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            shown.append(parameter.replace(annotation=kind or inspect.Parameter.empty))
    shown += [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS[name], annotation=kind
        )
        for name, kind in get_type_hints(Options).items()
    ]
    construct.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    construct.hyperparameters = tuple(found)  # type: ignore[attr-defined]
    return construct  # type: ignore[return-value]


def _hyperparameter(
    signature: Constructor, parameter: inspect.Parameter, about: About
) -> Hyperparameter:
    """Returns the hyperparameter that a keyword defines.

    Raises:
        TypeError: its name has another meaning, or its default is missing or not allowed.
    """
    name, default = parameter.name, parameter.default
    if name in _TAKEN or name in RESERVED or name in Options.__annotations__:
        raise TypeError(
            f"{signature.__qualname__}: {name} cannot be a hyperparameter, because it has another "
            "meaning in every optimizer. Give it another name"
        )
    found = Hyperparameter(name, default, **vars(about))
    try:
        found.check(None if default is inspect.Parameter.empty else default)
    except ValueError as error:
        raise TypeError(f"{signature.__qualname__}: the default of {error}") from None
    return found


def hyperparameters_of(constructor: Callable[..., None]) -> tuple[Hyperparameter, ...] | None:
    """Returns the hyperparameters of a constructor made by :func:`arguments`; None for others."""
    return getattr(constructor, "hyperparameters", None)
