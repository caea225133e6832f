"""The plan of a step: what stays the same from step to step while no tensor moves."""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import add, le
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_s3.kernels.choice import Choice
from megatron_s3.optimizers.checks import check_finite, rates
from megatron_s3.optimizers.counts import Update, Watched
from megatron_s3.optimizers.description import Description
from megatron_s3.optimizers.found import Found, Spot
from megatron_s3.optimizers.offload import Offload

__all__ = ["Call", "Plan", "Plans", "Task"]

_MOST_GROUPS = 8  # of a call: the GPU's kernel compares with each


@dataclass(frozen=True)
class Task:
    """The work of one call of a kernel: parameters of one group on one device.

    ``description`` is that of the group's algorithm.  ``again`` is set if an earlier task of the
    step may write the same memory, so that the operands have to be made again.
    """

    description: Description
    updates: list[Update]
    choice: Choice
    group: dict[str, Any]
    values: dict[str, Any]
    rates: dict[str, Any]
    offload: Offload | None
    again: bool

    @property
    def params(self) -> list[Tensor]:
        """Its parameters, in order."""
        return [update.param for update in self.updates]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a fused kernel, for groups that differ in learning rate and weight decay alone.

    Attributes:
        groups: the indices of the param groups.
        rule: the rule of their algorithm.
        kernel: a module of :mod:`megatron_s3.kernels`.
        prepared: the kernel's ``Prepared`` for these parameters.
        indices: the indices of the parameters, group by group, among those with a gradient.
    """

    groups: list[int]
    rule: Callable[..., Tensor]
    kernel: ModuleType
    prepared: Any
    indices: list[int]


class Plan:
    """The calls of a step of which every parameter takes a fused kernel, without copies.

    A plan holds numbers and no tensor.

    Args:
        settings: what the calls depend on beside the tensors and the groups' numbers.
        found: the tensors of the step.
        written, grads: where these tensors are.
        calls: the calls.
        path: the text for the optimizer's ``path``.
    """

    def __init__(
        self,
        settings: tuple[Any, ...],
        found: Found,
        written: Spot,
        grads: Spot,
        calls: list[Call],
        path: str,
    ) -> None:
        self.calls, self.path = calls, path
        self._settings, self._missing, self._names = settings, found.missing, found.names
        self._written, self._grads = written, grads
        self._devices = list(map(Tensor.get_device, found.grads))
        self._bytes = array("q", _bytes(found.grads))
        ends = map(add, written.addresses, _bytes(found.written))
        spans = sorted(zip(written.addresses, ends, strict=True))
        self._begin, self._end = (array("q", some) for some in zip(*spans, strict=True))

    @classmethod
    def make(
        cls, settings: tuple[Any, ...], found: Found, calls: list[Call], path: str
    ) -> "Plan | None":
        """Returns the plan of a step that was taken; None if it cannot be repeated."""
        written, grads = Spot.of(found.written), Spot.of(found.grads)
        if written is None or grads is None or not all(written.contiguous + grads.contiguous):
            return None
        plan = cls(settings, found, written, grads, calls, path)
        disjoint = all(map(le, plan._end, plan._begin[1:]))
        return plan if disjoint and plan._apart(grads.addresses) else None

    def fits(self, settings: tuple[Any, ...], found: Found) -> bool:
        """Returns whether the calls are those of this step, after they have followed its gradients.

        Gradients may lie elsewhere than before, if they overlap nothing that the step writes.
        """
        if settings != self._settings or found.missing != self._missing:
            return False
        if found.names != self._names or Spot.of(found.written) != self._written:
            return False
        before, now = self._grads, Spot.of(found.grads)
        if (
            now is None
            or (now.types, now.dtypes, now.sizes) != (before.types, before.dtypes, before.sizes)
            or now.contiguous != before.contiguous
            or list(map(Tensor.get_device, found.grads)) != self._devices
            or any(map(Tensor.is_neg, found.grads))
        ):
            return False
        if now.addresses != before.addresses:
            freed = list(map(bool, now.addresses)) != list(map(bool, before.addresses))
            if freed or not self._apart(now.addresses):
                return False
            for call in self.calls:
                call.prepared.move_grads([now.addresses[i] for i in call.indices])
            self._grads = now
        return True

    def _apart(self, addresses: list[int]) -> bool:
        """Returns whether gradients at these addresses overlap nothing that is written."""
        end = array("q", map(add, addresses, self._bytes))
        behind = _tensor(self._end)
        before = torch.searchsorted(_tensor(self._begin), _tensor(end)) - 1
        overlap = (before >= 0) & (behind[before.clamp(min=0)] > _tensor(array("q", addresses)))
        return not bool(overlap.any())


class Plans:
    """The plans of an optimizer: of its last step, and of its last step with statistics."""

    def __init__(self) -> None:
        self._plans: dict[bool, Plan] = {}

    def repeat(self, optimizer: Any) -> bool:
        """Takes a step of an optimizer in the same way as the last one.

        Returns:
            False if the step is not the same; then no parameter was changed.

        Raises:
            RuntimeError, ValueError: see the optimizer's ``step``.  Nothing was changed.
        """
        host = optimizer.host
        plan = self._plans.get(host.statistics is not None)
        if plan is None or host.offload is not None or optimizer.counts or _is_capturing():
            return False
        found = Found.of(optimizer)
        if not plan.fits(_settings(optimizer), found):
            return False
        groups, values = optimizer.param_groups, []
        for group, missing in zip(groups, found.missing, strict=True):
            if not all(missing):
                optimizer.check_group(group)
            watched = Watched(group | {"step": group["step"] + 1})
            values.append(optimizer.algorithm_of(group).group_hyperparameters(watched))
            if watched.read and any(missing):
                return False
        for call in plan.calls:
            first = values[call.groups[0]]
            if call.kernel.reason(call.rule, (), **first) is not None:
                return False
            if not all(_are_equal(values[i], first) for i in call.groups[1:]):
                return False
        if optimizer.error_if_nonfinite:
            check_finite(optimizer.label, found.grads)
        optimizer.path = plan.path
        for group in groups:
            group["step"] += 1
        for call in plan.calls:
            its_rates = [tuple(rates(groups[i], groups[i]["step"]).values()) for i in call.groups]
            values_of_all = values[call.groups[0]]
            call.prepared.step(call.rule, its_rates, host.statistics, **values_of_all)
        found.note_writes()
        return True

    def remember(self, optimizer: Any, tasks: Sequence[Task]) -> None:
        """Makes the plan for the next step, if that can be taken in the same way as this one.

        Args:
            optimizer: the optimizer after its step.
            tasks: all calls of kernels of the step.
        """
        with_statistics = optimizer.host.statistics is not None
        self._plans.pop(with_statistics, None)
        if not tasks or optimizer.counts or _is_capturing():
            return
        if any(task.choice.reason is not None or task.offload is not None for task in tasks):
            return
        found = Found.of(optimizer)
        index = {id(param): i for i, param in enumerate(found.params)}
        groups = {id(group): i for i, group in enumerate(optimizer.param_groups)}
        calls = []
        for some in _together(tasks):
            kernel = some[0].choice.kernel
            prepared = kernel.Prepared([[u.operands for u in task.updates] for task in some])
            indices = [index[id(param)] for task in some for param in task.params]
            its_groups = [groups[id(task.group)] for task in some]
            calls.append(Call(its_groups, some[0].description.rule, kernel, prepared, indices))
        plan = Plan.make(_settings(optimizer), found, calls, optimizer.path)
        if plan is not None:
            self._plans[with_statistics] = plan


def _together(tasks: Iterable[Task]) -> list[list[Task]]:
    """Returns tasks in the lists that one call of a kernel can take."""
    calls: list[list[Task]] = []
    for task in tasks:
        for call in calls:
            same = task.choice.kernel is call[0].choice.kernel
            same = same and task.description is call[0].description
            same = same and task.params[0].device == call[0].params[0].device
            if same and len(call) < _MOST_GROUPS and _are_equal(task.values, call[0].values):
                call.append(task)
                break
        else:
            calls.append([task])
    return calls


def _are_equal(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Returns whether a rule's arguments are the same, as far as no tensor must be read for it."""
    if any(isinstance(value, Tensor) for value in (*one.values(), *two.values())):
        return one is two
    return one == two


def _settings(optimizer: Any) -> tuple[Any, ...]:
    """Returns what a plan depends on beside the tensors and the groups' numbers."""
    host = optimizer.host
    rows = None if host.statistics is None else len(host.statistics.rows)
    groups = optimizer.param_groups
    descriptions = tuple(optimizer.algorithm_of(group).description for group in groups)
    return (descriptions, optimizer.fused, host.master_params, host.statistics, rows)


def _is_capturing() -> bool:
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def _tensor(numbers: "array[int]") -> Tensor:
    return torch.frombuffer(numbers, dtype=torch.int64)


def _bytes(tensors: list[Tensor]) -> list[int]:
    return [tensor.numel() * tensor.element_size() for tensor in tensors]
