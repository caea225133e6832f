"""Param groups that differ in their rates alone, where Megatron takes them for one another."""

from collections.abc import Iterable
from typing import Any

from megatron.core.optimizer import distrib_optimizer, optimizer

__all__ = ["tell_apart"]

_RATES = ("max_lr", "min_lr")
_known_by: tuple[str, ...] = optimizer.param_group_identifier_keys


def tell_apart(parts: Iterable[list[dict[str, Any]]]) -> None:
    """Lets Megatron give every param group back what was saved of it.

    Before 0.19 it finds a saved group by multipliers and two marks, which ``--decoupled-lr`` and
    ``--use-mup`` leave equal: resumed, both groups have one's rates, with Adam too. Since then the
    rates are among what it goes by; here they are added where groups cannot be told apart, because
    others may be resumed with another rate.

    Args:
        parts: for each optimizer that Megatron has built, its param groups.
    """
    keys = _known_by
    for groups in parts:
        found = {tuple(str(group.get(key)) for key in _known_by) for group in groups}
        if len(found) < len(groups) and all(rate in g for g in groups for rate in _RATES):
            keys = tuple(dict.fromkeys((*_known_by, *_RATES)))
    for module in (optimizer, distrib_optimizer):
        module.param_group_identifier_keys = keys
