"""What every element-wise optimizer of the plugin shares: groups, state, checks, the stamp."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_s3.kernels import portable
from megatron_s3.optimizers.description import Description

__all__ = ["ElementwiseOptimizer"]


class ElementwiseOptimizer(torch.optim.Optimizer):
    """A :class:`torch.optim.Optimizer` whose update of an element depends on that element alone.

    A subclass names its :attr:`description` and its constructor's arguments.  State tensors have
    their parameter's shape and layout, float64 for float64 parameters and float32 for all others:
    half-precision parameters keep full-precision state.  A group also holds ``algorithm`` (the
    stamp that :meth:`load_state_dict` checks) and ``step`` (a Python int).

    Args:
        params: as for every torch optimizer.
        lr: learning rate, a number or a 0-dim tensor; None if every group is given one before the
            first step (Megatron's schedulers do).
        weight_decay: decoupled weight decay (lambda).
        error_if_nonfinite: check all gradients before a step and raise RuntimeError, nothing
            changed, if one holds NaN or inf.  Costs a pass over the gradients and a host
            synchronisation.  Without it such an element turns NaN alone, in its state and its
            parameter, as under torch.optim.AdamW.
        **hyperparameters: those of the description.

    Raises:
        ValueError: a hyperparameter out of range (here or in a group), a complex parameter.
    """

    description: ClassVar[Description]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None,
        weight_decay: float = 0.0,
        *,
        error_if_nonfinite: bool = False,
        **hyperparameters: Any,
    ) -> None:
        self.error_if_nonfinite = error_if_nonfinite
        #: Called with every update ``u`` (1-d, a part of a parameter) before it is applied.
        self.observe: Callable[[Tensor], None] | None = None
        #: Keep this process's hyperparameters (lr and weight decay aside) when state is loaded.
        #: torch's custom is that the saved ones win; where flags say what runs, the flags do.
        self.keep_hyperparameters = False
        defaults = dict(lr=lr, weight_decay=weight_decay, **hyperparameters)
        super().__init__(params, defaults | {"algorithm": self.description.name, "step": 0})

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps its own three attributes only; observe belongs to the process, not to a copy.
        own = {"error_if_nonfinite", "keep_hyperparameters"}
        return super().__getstate__() | {k: getattr(self, k) for k in own} | {"observe": None}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; raises ValueError for values that are not allowed, before adding any."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, not {type(param_group).__name__}")
        merged = self.defaults | param_group
        _check_rate("lr", merged["lr"])
        _check_rate("weight_decay", merged["weight_decay"])
        for hyperparameter in self.description.hyperparameters:
            hyperparameter.check(merged[hyperparameter.name])
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                self.param_groups.pop()
                raise ValueError(
                    f"{self.description.label} updates floating-point parameters, not "
                    f"{param.dtype}; view a complex parameter with torch.view_as_real"
                )
            if any(n > 1 and s == 0 for n, s in zip(param.shape, param.stride(), strict=True)):
                self.param_groups.pop()
                raise ValueError(
                    f"{self.description.label}: elements of a parameter of shape "
                    f"{tuple(param.shape)} share memory (expand); give the tensor it is a view of"
                )

    def init_state(self) -> None:
        """Allocates the state (zeros) of every parameter that has none yet."""
        for group in self.param_groups:
            for param in group["params"]:
                self._init_state(param)

    def _init_state(self, param: Tensor) -> list[Tensor]:
        state = self.state[param]
        for name in self.description.state:
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=_state_dtype(param))
        return [state[name] for name in self.description.state]

    def group_hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's keyword arguments for this group's coming step."""
        return self._own_hyperparameters(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss, as in torch.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: lr is still None.
            RuntimeError: a sparse, complex or otherwise unusable gradient, or a non-finite one
                under ``error_if_nonfinite``.  Every check precedes every change, so that a step
                is applied as a whole or not at all.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for index, group in enumerate(self.param_groups):
            _check_rate("lr", group["lr"], may_be_none=False)
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                self._check_grad(param, index)
            work.append((group, params))
        if self.error_if_nonfinite:
            self._check_finite([param for _, params in work for param in params])
        states = [[self._init_state(param) for param in params] for _, params in work]
        for (group, params), group_states in zip(work, states, strict=True):
            group["step"] += 1
            portable.step(
                self.description.rule,
                params,
                [param.grad for param in params],
                group_states,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                observe=self.observe,
                **self.group_hyperparameters(group),
            )
        return loss

    def _check_grad(self, param: Tensor, group: int) -> None:
        grad = param.grad
        fault = None
        if grad.layout != torch.strided:
            fault = f"is {grad.layout}; a dense gradient is needed (sparse=False in the embedding?)"
        elif not grad.is_floating_point():
            fault = f"is {grad.dtype}; a real floating-point gradient is needed"
        if fault:
            shape = tuple(param.shape)
            raise RuntimeError(
                f"{self.description.label}: the gradient of a parameter of shape {shape} in group "
                f"{group} {fault}. No parameter was changed."
            )

    def _check_finite(self, params: list[Tensor]) -> None:
        bad = [not bool(param.grad.isfinite().all()) for param in params]
        if any(bad):
            shapes = [tuple(p.shape) for p, is_bad in zip(params, bad, strict=True) if is_bad]
            raise RuntimeError(
                f"{self.description.label}: NaN or inf in the gradients of {len(shapes)} "
                f"parameters, the first of shape {shapes[0]}. No parameter was changed."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but only what this optimizer saved, and with the state's dtype kept.

        Raises:
            ValueError: the state is another optimizer's, or was made with a hyperparameter without
                which it has no meaning (``p``).  Nothing is loaded then.
        """
        check_stamps(self, state_dict["param_groups"])
        names = self.description.state
        saved_state = {
            i: {name: tensors[name] for name in names if name in tensors}
            for i, tensors in state_dict["state"].items()
        }
        own = [self._own_hyperparameters(group) for group in self.param_groups]
        super().load_state_dict(state_dict | {"state": saved_state})
        if self.keep_hyperparameters:
            for group, values in zip(self.param_groups, own, strict=True):
                group.update(values)
        # torch casts floating-point state to its parameter's dtype, which would round the
        # full-precision state of half-precision parameters.
        params = [param for group in self.param_groups for param in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for param, i in zip(params, ids, strict=True):
            if param.dtype == _state_dtype(param):
                continue
            for name, tensor in saved_state.get(i, {}).items():
                self.state[param][name] = tensor.to(param.device, _state_dtype(param), copy=True)

    def _own_hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        return {h.name: group[h.name] for h in self.description.hyperparameters}


def check_stamps(optimizer: ElementwiseOptimizer, saved_groups: list[dict[str, Any]]) -> None:
    """Raises ValueError unless param groups of a checkpoint fit the optimizer's state.

    Args:
        optimizer: the one that would load them.
        saved_groups: param groups as saved, with or without their parameters.
    """
    ours = optimizer.description
    own_groups = optimizer.param_groups or [optimizer.defaults]
    if len(own_groups) != len(saved_groups):
        own_groups = own_groups[:1] * len(saved_groups)
    for own, group in zip(own_groups, saved_groups, strict=True):
        name = group.get("algorithm", "another optimizer")
        if name != ours.name:
            raise ValueError(
                f"this optimizer is {ours.label}, but the state to load was saved by {name}; the "
                "two keep different averages. Load the model's weights alone, or resume with the "
                "optimizer that saved it."
            )
        for h in ours.hyperparameters:
            if h.fixes_state and group[h.name] != own[h.name]:
                raise ValueError(
                    f"the state to load was made by {ours.label} with {h.name}={group[h.name]}, "
                    f"and has no meaning with {h.name}={own[h.name]}. Resume with "
                    f"{h.name}={group[h.name]}, or load the model's weights alone."
                )


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _check_rate(name: str, value: Any, may_be_none: bool = True) -> None:
    if value is None and name == "lr":
        if may_be_none:
            return
        raise ValueError("lr is None: give the optimizer a learning rate, or set one in each group")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} as a tensor must have one element, not {tuple(value.shape)}")
        return  # its value stays on the device, unread
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, not {value!r}")
