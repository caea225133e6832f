"""The updates of a step, and the count of each parameter's updates."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from megatron_s3.kernels.operands import Operands, local

__all__ = ["Counts", "GroupUpdates", "Update", "Watched", "is_empty", "split"]


class Update(NamedTuple):
    """One update of a parameter.

    ``count`` is its number among the parameter's updates, from 1, if it is not the group's step.
    """

    param: Tensor
    grad: Tensor
    operands: Operands
    copies: list[tuple[Tensor, Tensor]]
    count: int | None = None  # type: ignore[assignment]


@dataclass(frozen=True)
class GroupUpdates:
    """The updates of one param group in a step.

    Attributes:
        group: the param group before the step.
        values: the rule's arguments in this step.
        reads_step: whether these depend on the number of the step.
        updates: the updates in order.
    """

    group: dict[str, Any]
    values: dict[str, Any]
    reads_step: bool
    updates: list[Update]

    def by_values(
        self, hyperparameters: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], list[Update]]]:
        """Yields the rule's arguments and the updates that share them.

        Args:
            hyperparameters: returns the rule's arguments for a group with a certain step.
        """
        counts = {update.count for update in self.updates}
        if counts <= {None}:
            yield self.values, self.updates
            return
        equal: dict[tuple[Any, ...], tuple[dict[str, Any], list[Update]]] = {}
        known = {
            count: self.values if count is None else hyperparameters(self.group | {"step": count})
            for count in counts
        }
        for update in self.updates:
            values = known[update.count]
            equal.setdefault(tuple(values.items()), (values, []))[1].append(update)
        yield from equal.values()


def split(parts: list[GroupUpdates], cuts: Sequence[int]) -> list[list[GroupUpdates]]:
    """Returns the updates of a step in pieces.

    Args:
        parts: the updates of the step's groups.
        cuts: the indices, among all updates, at which a new piece begins; ascending, from 1.
    """
    if not cuts:
        return [parts]
    pieces: list[list[GroupUpdates]] = [[]]
    index, begins = 0, set(cuts)
    for part in parts:
        some: list[Update] = []
        for update in part.updates:
            if index in begins:
                pieces[-1].append(replace(part, updates=some))
                pieces.append([])
                some = []
            some.append(update)
            index += 1
        pieces[-1].append(replace(part, updates=some))
    return pieces


def is_empty(param: Tensor) -> bool:
    """Returns whether this rank holds no element of a parameter; other ranks may."""
    return not is_lazy(param) and local(param).numel() == 0


class Watched(dict[str, Any]):
    """A param group that records whether its step is read."""

    read = False

    def __getitem__(self, key: str) -> Any:
        """Returns the value of a key, as a dict does."""
        self.read |= key == "step"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, as a dict does."""
        self.read |= key == "step"
        return super().get(key, default)


class Counts:
    """The number of updates of each parameter for which it is not its group's ``step``.

    As in torch's optimizers, a parameter counts the steps in which it had a gradient since its
    state was made.  In most trainings this number is the same for all parameters, and nothing is
    stored here.  Groups whose rule does not read the step are ignored.
    """

    def __init__(self) -> None:
        self._own: dict[Tensor, int] = {}

    def __bool__(self) -> bool:
        return bool(self._own)

    def of(self, param: Tensor, group: Mapping[str, Any]) -> int:
        """Returns the number of updates of a parameter of the group."""
        return self._own.get(param, int(group["step"]))

    def begin(self, group: Mapping[str, Any], params: Iterable[Tensor]) -> None:
        """Starts counting at 0 for parameters that have no state."""
        for param in params:
            self._set(param, group, 0)

    def number(self, parts: Iterable[GroupUpdates]) -> None:
        """Numbers the updates of a step; a parameter may be updated several times."""
        counts: dict[Tensor, int] = {}
        for part in parts:
            if part.reads_step:
                for i, update in enumerate(part.updates):
                    param = update.param
                    count = counts[param] = counts.get(param, self.of(param, part.group)) + 1
                    if count != part.group["step"] + 1:
                        part.updates[i] = update._replace(count=count)

    def advance(self, parts: Sequence[GroupUpdates]) -> None:
        """Counts a step."""
        for part in parts:
            group, updates = part.group, part.updates
            if part.reads_step and len(updates) < len(group["params"]):
                stepped = {update.param for update in updates}
                for param in group["params"]:
                    if param not in stepped and param not in self._own and not is_empty(param):
                        self._own[param] = group["step"]
        for part in parts:
            part.group["step"] += 1
        if any(update.count is not None for part in parts for update in part.updates):
            for part in parts:
                for update in part.updates:
                    self._set(update.param, part.group, update.count or part.group["step"])

    def _set(self, param: Tensor, group: Mapping[str, Any], count: int) -> None:
        # If this rank holds no element of a sharded parameter, other ranks know its count.
        if count == group["step"] or is_empty(param):
            self._own.pop(param, None)
        else:
            self._own[param] = count

    def keep(self, group: Mapping[str, Any]) -> None:
        """Stores the count of each parameter, so that the group's ``step`` may be set."""
        for param in group["params"]:
            if param not in self._own and not is_empty(param):
                self._own[param] = group["step"]

    def save(
        self, param_groups: Iterable[dict[str, Any]], saved: Iterable[dict[str, Any]]
    ) -> list[int]:
        """Adds ``steps``, a list parallel to ``params``, to each saved group with different counts.

        Returns:
            The indices of these groups.
        """
        differing = []
        for index, (group, its) in enumerate(zip(param_groups, saved, strict=True)):
            if not self._own.keys().isdisjoint(group["params"]):
                its["steps"] = [self.of(param, group) for param in group["params"]]
                differing.append(index)
        return differing

    def load(self, param_groups: list[dict[str, Any]]) -> None:
        """Takes ``steps`` from loaded groups; without it every count is the group's step."""
        self._own.clear()
        for group in param_groups:
            for param, step in zip(group["params"], group.pop("steps", ()), strict=False):
                self._set(param, group, int(step))
