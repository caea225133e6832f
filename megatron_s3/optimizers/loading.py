"""Loading of a saved state, completely or not at all, in the optimizer's dtypes."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_s3.kernels.compact import FRACTION, REMAINDER
from megatron_s3.optimizers.checks import of_shape, state_fault
from megatron_s3.optimizers.description import FORMAT, FORMAT_WITH_STEPS, Description, plain
from megatron_s3.optimizers.stamp import Stamp, check_parts, settings
from megatron_s3.optimizers.values import excess, put

__all__ = ["Loading", "check_stamps"]

#: The dtypes of states that do not hold their values.
_CODED = (FRACTION, REMAINDER)
#: Conversions that lose nothing of what such a state held when it was saved.
_EXACT = ((torch.bfloat16, FRACTION), (torch.float32, REMAINDER))


class Loading:
    """One call of an optimizer's ``load_state_dict``.

    torch runs the caller's pre-hooks, then :meth:`take`.  It moves, casts and stores the rest of
    the state, then runs :meth:`put` and the caller's post-hooks, which therefore see the final
    state.  The state tensors do not pass through torch, which would cast them to their parameter's
    dtype and move them to its device.

    Args:
        optimizer: an :class:`~megatron_s3.optimizers.base.ElementwiseOptimizer`.

    Attributes:
        converted: texts that name the states that were saved in another dtype.
    """

    def __init__(self, optimizer: Any) -> None:
        self.converted: set[str] = set()
        self._states: list[tuple[Description, Tensor, dict[str, Tensor]]] = []
        self._own = [
            {
                h.name: group[h.name]
                for h in optimizer.algorithm_of(group).description.hyperparameters
            }
            for group in optimizer.param_groups
        ]

    def take(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Checks the state that the caller's hooks returned, and takes the state tensors from it.

        Raises:
            ValueError: see the optimizer's ``load_state_dict``.
        """
        saved_groups = state_dict["param_groups"]
        check_stamps(optimizer, saved_groups)
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if sizes != [len(group["params"]) for group in saved_groups]:
            return state_dict  # torch raises the error
        for index, group in enumerate(saved_groups):
            _check_counts(index, group)
        rest = dict(state_dict["state"])
        params = [
            (optimizer.algorithm_of(group).description, param)
            for group in optimizer.param_groups
            for param in group["params"]
        ]
        ids = itertools.chain.from_iterable(group["params"] for group in saved_groups)
        for index, ((description, param), i) in enumerate(zip(params, ids, strict=True)):
            if i in rest:
                taken = self._checked(optimizer, description, param, rest[i], index)
                drop = {*description.state, "master_param"}
                rest[i] = {name: value for name, value in rest[i].items() if name not in drop}
                self._states.append((description, param, taken))
        return state_dict | {"state": rest}

    @staticmethod
    def _checked(
        optimizer: Any, description: Description, param: Tensor, saved: dict[str, Any], index: int
    ) -> dict[str, Tensor]:
        """Returns the states to take from a parameter's saved ones."""
        label, names = description.label, description.state
        missing = [name for name in names if name not in saved]
        if missing and len(missing) < len(names):
            raise ValueError(
                f"{label}: the state to load for parameter {index} has no {', '.join(missing)}. "
                "Nothing was loaded."
            )
        masters = ["master_param"] if optimizer.host.keeps_master(param) else []
        taken = {name: saved[name] for name in (*names, *masters) if name in saved}

        def faults() -> Iterator[tuple[str, str | None]]:
            for name, tensor in taken.items():
                yield name, state_fault(param, tensor)
            for name in taken.keys() & description.fractions.keys():
                if optimizer.place(name, param)[1] == FRACTION:
                    yield name, excess(description, name, saved)

        for name, fault in faults():
            if fault:
                raise ValueError(
                    f"{label}: the {name} to load for parameter {index}{of_shape(param)} "
                    f"{fault}. Nothing was loaded."
                )
        return taken

    def put(self, optimizer: Any) -> None:
        """Stores the states, each in the optimizer's dtype and on the right device."""
        for group in optimizer.param_groups:
            group["format"], group["step"] = FORMAT, int(group["step"])
            group.pop("fractions", None)
        optimizer.counts.load(optimizer.param_groups)
        if optimizer.host.keep_hyperparameters:
            for group, values in zip(optimizer.param_groups, self._own, strict=True):
                group.update(values)
        for description, param, tensors in self._states:
            state = optimizer.state[param]
            for name, tensor in tensors.items():
                device, dtype = optimizer.place(name, param)
                if tensor.dtype != dtype and (tensor.dtype, dtype) not in _EXACT:
                    self.converted.add(f"{name} from {tensor.dtype} to {dtype}")
                # As in torch, a tensor that is neither cast nor moved is shared.
                copy = dtype != param.dtype and device == param.device
                state[name] = tensor.to(device, dtype, copy=copy)
            # Values of other dtypes than their states', which a cast does not convert.
            coded = {n: tensor for n, tensor in tensors.items() if state[n].dtype in _CODED}
            put(description, param, state, coded)


def check_stamps(optimizer: Any, saved_groups: list[dict[str, Any]]) -> None:
    """Raises ValueError unless param groups of a checkpoint fit the optimizer's state.

    Args:
        optimizer: the optimizer that would load them.
        saved_groups: param groups as saved, with or without their parameters.
    """
    own_groups = optimizer.param_groups or [optimizer.defaults]
    check_parts(own_groups, saved_groups)
    if len(own_groups) != len(saved_groups):
        own_groups = own_groups[:1] * len(saved_groups)
    for own, group in zip(own_groups, saved_groups, strict=True):
        ours = optimizer.algorithm_of(own).description
        called = functools.partial(_called, ours)
        whose, form = group.get("algorithm", "another optimizer"), group.get("format", 1)
        Stamp(ours.name, FORMAT_WITH_STEPS, settings(ours, own)).check(
            Stamp(whose, form, settings(ours, group)), called=called
        )
        if form == FORMAT_WITH_STEPS and "steps" not in group:
            raise ValueError(
                "the state to load was saved with the number of updates of every parameter, which "
                "is missing: group['steps'], a list parallel to group['params']. If you load a "
                "checkpoint into a state dict (torch.distributed.checkpoint), add such a list to "
                "each of its groups first: group['steps'] = [0] * len(group['params'])."
            )


def _check_counts(index: int, group: dict[str, Any]) -> None:
    """Raises ValueError unless a saved group holds usable numbers of updates."""
    wrong = None
    if not _is_count(group.get("step")):
        wrong = f"step={group.get('step')!r}, which must be a whole number from 0"
    steps, length = group.get("steps"), len(group["params"])
    if "steps" in group and not (
        isinstance(steps, list | tuple) and len(steps) == length and all(map(_is_count, steps))
    ):
        wrong = f"steps={steps!r}, which must be a list of {length} whole numbers from 0"
    if wrong:
        raise ValueError(
            f"the state to load has in param group {index} {wrong}. Nothing was loaded."
        )


def _is_count(value: Any) -> bool:
    number = plain(value)
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return is_number and number >= 0 and float(number).is_integer()


def _called(ours: Description, name: str, value: Any) -> str:
    if name == "optimizer":
        return ours.label if value == ours.name else str(value)
    return f"{name}={value}"
