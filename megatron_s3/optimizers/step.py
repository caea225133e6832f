"""The step of an element-wise optimizer: checks, the choice of kernels, and their calls."""

import logging
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from megatron_s3.kernels.choice import choose, path
from megatron_s3.kernels.compact import FRACTION
from megatron_s3.kernels.operands import Operands, flatten, write_back
from megatron_s3.kernels.overlap import Overlaps
from megatron_s3.optimizers.checks import (
    check_finite,
    grad_fault,
    of_shape,
    placements,
    rates,
    state_fault,
)
from megatron_s3.optimizers.counts import GroupUpdates, Update, Watched, is_empty, split
from megatron_s3.optimizers.description import Description
from megatron_s3.optimizers.offload import Offload
from megatron_s3.optimizers.plan import Plans, Task

__all__ = ["Past", "Step"]

_logger = logging.getLogger(__name__)
#: A step after the last one of any training.
_LAST = 2**40


@dataclass
class Past:
    """The memory of an optimizer's steps: what they keep for the next ones.

    Attributes:
        overlaps: the search for shared memory.
        logged: the reasons for torch operations that were logged.
        plans: the plans of the last steps.
    """

    overlaps: Overlaps = field(default_factory=Overlaps)
    logged: set[str] = field(default_factory=set)
    plans: Plans = field(default_factory=Plans)


class Step:
    """One step of an optimizer, applied completely or not at all.

    A step checks its tensors and chooses kernels for them.  The next one finds most of them where
    they were, and then repeats the same calls (:class:`~megatron_s3.optimizers.plan.Plan`).

    Args:
        optimizer: an :class:`~megatron_s3.optimizers.base.ElementwiseOptimizer`.
        past: what its steps remember.
    """

    def __init__(self, optimizer: Any, past: Past) -> None:
        self._optimizer, self._past = optimizer, past
        self._host = optimizer.host

    def run(self) -> None:
        """Updates every parameter that has a gradient.

        Raises:
            RuntimeError, ValueError: see the optimizer's ``step``.  Nothing was changed.
        """
        if self._past.plans.repeat(self._optimizer):
            return
        optimizer = self._optimizer
        work = []
        for index, group in enumerate(optimizer.param_groups):
            grads = ((param, _grad(param)) for param in group["params"])
            found = [(param, grad) for param, grad in grads if grad is not None]
            description = optimizer.algorithm_of(group).description
            if found:
                optimizer.check_group(group)
            for param, grad in found:
                self._check_grad(description, param, grad, index)
                self._check_state(description, param, index)
            work.append((group, found))
        if self._nothing_to_do(work):
            return
        if optimizer.error_if_nonfinite:
            check_finite(optimizer.label, [grad for _, found in work for _, grad in found])
        updates = [self._updates(group, found) for group, found in work]
        # Every kernel is chosen before anything is changed.
        tasks = self._tasks(updates)
        operands = [[update.operands for update in task.updates] for task in tasks]
        optimizer.path = path([task.choice for task in tasks], operands) or optimizer.path
        self._log(tasks, optimizer.path)
        optimizer.counts.advance(updates)
        for task in tasks:
            self.call(task, task.choice.kernel)
        self._past.plans.remember(optimizer, tasks)

    def _nothing_to_do(self, work: list[tuple[dict[str, Any], list[Any]]]) -> bool:
        """Returns whether no parameter has a gradient; a rank with only empty shards needs none."""
        if any(found for _, found in work):
            return False
        return not all(is_empty(param) for group, _ in work for param in group["params"])

    def _updates(self, group: dict[str, Any], found: list[tuple[Tensor, Tensor]]) -> GroupUpdates:
        watched = Watched(group | {"step": group["step"] + 1})
        algorithm = self._optimizer.algorithm_of(group)
        values, description = algorithm.group_hyperparameters(watched), algorithm.description
        self._check_capture(group, values if watched.read else None, found)
        if watched.read:
            first, states = description.state[:1], self._optimizer.state
            fresh = (p for p in group["params"] if any(n not in states.get(p, ()) for n in first))
            self._optimizer.counts.begin(group, fresh)
        flat = [
            Update(param, grad, *self._flatten(description, param, grad)) for param, grad in found
        ]
        return GroupUpdates(group, values, watched.read, flat)

    def _check_capture(
        self,
        group: dict[str, Any],
        values: dict[str, Any] | None,
        found: list[tuple[Tensor, Tensor]],
    ) -> None:
        """Raises RuntimeError if a graph is captured of what differs from step to step.

        Args:
            group: the param group.
            values: the rule's arguments, if they depend on the number of the step; else None.
            found: parameters and gradients.
        """
        cuda = any(param.device.type == "cuda" for param, _ in found)
        if not cuda or not torch.cuda.is_current_stream_capturing():
            return
        algorithm, changing = self._optimizer.algorithm_of(group), None
        if any(self._optimizer.state_dtypes[n] == FRACTION for n in algorithm.description.state):
            changing = "the rounding to int8 depends on the number of the step"
        if values is not None and any(
            values != algorithm.group_hyperparameters(group | {"step": step})
            for step in (group["step"] + 2, _LAST)
        ):
            changing = "bias correction, a ramp or cautious_steps changes the rule's arguments"
        if changing is not None:
            raise RuntimeError(
                f"{algorithm.description.label}: a CUDA graph is being captured, and {changing}, "
                "which a replay would not see. No parameter was changed. Step outside of the graph."
            )

    def _tasks(self, updates: list[GroupUpdates]) -> list[Task]:
        """Returns the calls of kernels that make a step, in order."""
        cuts = self._past.overlaps.cuts(
            [(u.operands, u.copies) for part in updates for u in part.updates]
        )
        if cuts or self._optimizer.counts:
            self._optimizer.counts.number(updates)
        tasks: list[Task] = []
        for segment in split(updates, cuts):
            some: list[Task] = []
            for part in segment:
                algorithm = self._optimizer.algorithm_of(part.group)
                for values, equal in part.by_values(algorithm.group_hyperparameters):
                    some += self._group_tasks(part.group, values, equal, again=bool(tasks))
            # Tasks that do not wait for a copy come first.
            some.sort(key=lambda task: task.offload is not None)
            tasks += some
        return tasks

    def _group_tasks(
        self, group: dict[str, Any], values: dict[str, Any], updates: list[Update], *, again: bool
    ) -> list[Task]:
        batches: list[tuple[list[Update], Offload | None]] = [(updates, None)]
        if (offload := self._host.offload) is not None:
            batches = [([u for u in updates if u.param not in offload.params], None)]
            batches += [(batch, offload) for batch in offload.batches(updates)]
        tasks = []
        description = self._optimizer.algorithm_of(group).description
        for batch, its_offload in batches:
            for choice in choose(
                *(description.rule, [u.operands for u in batch], values),
                *(description.label, self._optimizer.fused),
            ):
                some = [batch[i] for i in choice.indices]
                its_rates = rates(group, group["step"] + 1)
                tasks.append(
                    Task(description, some, choice, group, values, its_rates, its_offload, again)
                )
        return tasks

    def _log(self, tasks: list[Task], taken: str) -> None:
        if self._optimizer.fused is not False and self._host.log_path:
            found = {task.choice.reason for task in tasks if task.choice.reason is not None}
            reasons = found - self._past.logged
            if reasons:
                self._past.logged |= reasons
                _logger.warning(
                    "%s is updated by torch operations: %s", self._optimizer.label, taken
                )

    def call(self, task: Task, kernel: ModuleType) -> None:
        """Calls a kernel, and copies offloaded tensors between the CPU and the device."""
        offload, statistics = task.offload, self._host.statistics
        flat = [(update.operands, update.copies) for update in task.updates]
        if task.again:
            flat = [self._flatten(task.description, u.param, u.grad) for u in task.updates]
        if offload is not None:
            offload.wait(task.params)
            statistics = offload.statistics(statistics)
        kernel.step(
            *(task.description.rule, [operands for operands, _ in flat]),
            statistics=statistics,
            **task.values,
            **task.rates,
        )
        write_back([copy for _, copies in flat for copy in copies])
        if offload is not None:
            for param in task.params:
                offload.send_back(param, self._optimizer.state[param]["master_param"])
            if statistics is not None and self._host.statistics is not None:
                self._host.statistics.absorb(statistics)

    def _flatten(
        self, description: Description, param: Tensor, grad: Tensor
    ) -> tuple[Operands, list[tuple[Tensor, Tensor]]]:
        host, state = self._host, self._optimizer.made_state(param, description)
        row = 0 if host.statistics is None else host.statistics.rows.get(param, 0)
        if not host.keeps_master(param):
            return flatten(param.detach(), grad, state, host.model_params.get(param), row)
        master, new = self._optimizer.state[param]["master_param"], param.detach()
        if offload := host.offload_of(param):
            grad, new = offload.fetch(param, grad), offload.new(param)
        return flatten(master, grad, state, new, row)

    def _check_state(self, description: Description, param: Tensor, group: int) -> None:
        state = self._optimizer.state.get(param)
        if not state:
            return
        device = self._host.device_of(param)
        for name in (*description.state, "master_param"):
            if name not in state:
                continue
            _, dtype = self._optimizer.place(name, param)
            if fault := state_fault(param, state[name], device, dtype):
                raise RuntimeError(
                    f"{description.label}: the {name} of a parameter{of_shape(param)} in "
                    f"group {group} {fault}. No parameter was changed."
                )

    def _check_grad(
        self, description: Description, param: Tensor, grad: Tensor, group: int
    ) -> None:
        if fault := grad_fault(param, grad):
            shape = tuple(param.shape)
            raise RuntimeError(
                f"{description.label}: the gradient of a parameter of shape {shape} in group "
                f"{group} {fault}. No parameter was changed."
            )


def _grad(param: Any) -> Tensor | None:
    grad: Any = getattr(param, "decoupled_grad", None)
    grad = param.grad if grad is None else grad
    same = grad is None or placements(grad) == placements(param)
    # If only one of the two is a DTensor, grad_fault describes it.
    if same or placements(grad) is None or placements(param) is None:
        return cast("Tensor | None", grad)
    # As in torch's optimizers: autograd may leave it partial, or laid out in another way.
    laid_out: Tensor = grad.redistribute(param.device_mesh, param.placements)
    return laid_out
