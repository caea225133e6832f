"""The base of the plugin's element-wise optimizers: groups, state, checks, the stamp."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from megatron_s3.kernels.overlap import Overlaps
from megatron_s3.optimizers.arguments import hyperparameters_of
from megatron_s3.optimizers.checks import (
    check_decay,
    largest,
    rate,
    shares_memory,
)
from megatron_s3.optimizers.counts import Counts
from megatron_s3.optimizers.description import FORMAT, FORMAT_WITH_STEPS, Description, plain
from megatron_s3.optimizers.host import Host
from megatron_s3.optimizers.loading import Loading
from megatron_s3.optimizers.step import Step

__all__ = ["ElementwiseOptimizer"]

#: What torch's schedulers write the momentum to, if it is among an optimizer's defaults.
MOMENTUM = "momentum"


class ElementwiseOptimizer(torch.optim.Optimizer):
    """A :class:`torch.optim.Optimizer` whose update of an element depends on that element alone.

    A subclass names its :attr:`description` and its constructor's arguments.  State tensors have
    their parameter's shape and layout, float64 for float64 parameters and ``state_dtype`` for all
    others: half-precision parameters keep full-precision state unless asked otherwise.  A group
    also holds ``algorithm`` and ``format`` (the stamp that :meth:`load_state_dict` checks) and
    ``step`` (a Python int).  A gradient is read from ``param.decoupled_grad``, which may have
    another dtype than the parameter, where that is set, and else from ``param.grad``.  Parameters
    that torch shards (DTensors, as FSDP2 makes them) have DTensors for state, and each rank steps
    its own part.

    Args:
        params: as for every torch optimizer.
        lr: learning rate, a number or a 0-dim tensor; None if every group is given one before the
            first step (Megatron's schedulers do).
        weight_decay: decoupled weight decay (lambda).
        error_if_nonfinite: check all gradients before a step and raise RuntimeError, nothing
            changed, if one holds NaN or inf.  Costs a pass over the gradients and a host
            synchronisation.  Without it such an element turns NaN alone, in its state and its
            parameter, as under torch.optim.AdamW.
        fused: None takes the device's kernel where it can run and torch operations elsewhere; True
            makes it an error where it cannot; False never takes it.
        state_dtype: of the states, or of each by its name (what is left out is float32).
        **hyperparameters: those of the description; what is left out has its default.

    Raises:
        TypeError: an unknown hyperparameter.
        ValueError: a hyperparameter out of range (here or in a group), a complex parameter.
    """

    description: ClassVar[Description]

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        found = hyperparameters_of(cls.__init__)
        if found is not None and "__init__" in vars(cls):
            cls.description = replace(cls.description, hyperparameters=found)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = 1e-3,
        *,
        weight_decay: float = 0.0,
        error_if_nonfinite: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
        **hyperparameters: Any,
    ) -> None:
        if fused is not None and not isinstance(plain(fused), bool):
            raise ValueError(f"fused must be True, False or None, not {fused!r}")
        self.error_if_nonfinite = error_if_nonfinite
        self.fused = plain(fused)
        #: What the last step ran: "C++ kernel", "Triton kernel", or "portable: " and the reason;
        #: where some parameters alone need torch operations, both.
        self.path = ""
        #: What the program around it asks of it.
        self.host = Host()
        self.state_dtypes = self._state_dtypes(state_dtype)
        values = {h.name: h.default for h in self.description.hyperparameters}
        if unknown := sorted(set(hyperparameters) - set(values)):
            raise TypeError(f"{self.description.label} has no {', '.join(unknown)}")
        defaults = {"lr": lr, "weight_decay": weight_decay} | values | hyperparameters
        self._values({"params": []} | defaults, most=math.inf)  # before a look at the params
        self._logged: set[str] = set()
        #: How many updates each parameter has had, where that is not its group's ``step``.
        self.counts = Counts()
        self._overlaps = Overlaps()
        stamp = {"algorithm": self.description.name, "format": FORMAT}
        if self.description.momentum:
            stamp[MOMENTUM] = defaults[self.description.momentum]
        super().__init__(params, defaults | stamp | {"step": 0})

    #: What a constructor of :func:`megatron_s3.optimizers.arguments.arguments` runs.
    construct = __init__

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps its own three attributes only; what else a copy takes along, and what stays.
        own = ("error_if_nonfinite", "fused", "counts")
        state = super().__getstate__() | {name: getattr(self, name) for name in own}
        return state | {
            "_logged": set(),
            "_overlaps": Overlaps(),
            "state_dtypes": dict(self.state_dtypes),
            "host": replace(self.host, statistics=None, model_params={}),
            "path": "",
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # by torch's loading, too, where the rest is there
        self.__dict__.setdefault("counts", Counts())
        if "host" not in self.__dict__:  # of an older version, whose attributes they were
            known = {f.name for f in fields(Host)} & self.__dict__.keys()
            self.host = Host(**{name: self.__dict__.pop(name) for name in known})
        if self.description.momentum:
            self.defaults.setdefault(MOMENTUM, self.defaults.get(self.description.momentum))
        for group in self.param_groups:  # as torch's do: what an older version did not know
            for h in self.description.hyperparameters:
                group.setdefault(h.name, h.default)
            group.setdefault("format", FORMAT)

    def _state_dtypes(
        self, given: torch.dtype | Mapping[str, torch.dtype]
    ) -> dict[str, torch.dtype]:
        names = self.description.state
        if isinstance(given, torch.dtype):
            return dict.fromkeys(names, given)
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(
                f"state_dtype names {', '.join(unknown)}, but the states of "
                f"{self.description.label} are {', '.join(names)}"
            )
        return {name: given.get(name, torch.float32) for name in names}

    @classmethod
    def check_state_dtype(
        cls, name: str, dtype: torch.dtype, hyperparameters: Mapping[str, Any]
    ) -> None:
        """Raises ValueError if the arithmetic does not allow a state to be kept in this dtype.

        Args:
            name: of the state.
            dtype: asked for.
            hyperparameters: a group's.
        """
        if dtype != torch.float32:
            raise ValueError(f"{cls.description.label} keeps {name} in float32, not in {dtype}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does; raises ValueError for what is not allowed, and adds none."""
        named = isinstance(param_group, dict) and MOMENTUM in param_group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self.description.momentum and not named:
            del group[MOMENTUM]  # which is there for schedulers to find among the defaults
        try:
            values = self._values(group)
            for name, dtype in self.state_dtypes.items():
                self.check_state_dtype(name, dtype, values)
            for param in group["params"]:
                self._check_param(param)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_param(self, param: Tensor) -> None:
        if not param.is_floating_point():
            raise ValueError(
                f"{self.description.label} updates floating-point parameters, not "
                f"{param.dtype}; view a complex parameter with torch.view_as_real"
            )
        if not is_lazy(param) and shares_memory(param):
            raise ValueError(
                f"{self.description.label}: elements of a parameter of shape "
                f"{tuple(param.shape)} share memory (expand); give the tensor it is a view of"
            )

    def _values(self, group: dict[str, Any], most: float | None = None) -> dict[str, Any]:
        """Returns the group's rates and hyperparameters for a step; ValueError if one is wrong."""
        if most is None:
            most = largest(group["params"])
        values = {name: rate(name, group[name], most) for name in ("lr", "weight_decay")}
        if values["weight_decay"] is None:
            raise ValueError("weight_decay must be a number, not None")
        check_decay(values["lr"], values["weight_decay"], most)
        written = self._written(group)
        for h in self.description.hyperparameters:
            values[h.name] = h.check(written[h.name], largest=most)
        return values

    def init_state(self) -> None:
        """Allocates the state (zeros) of every parameter that has none yet.

        Parameters that a lazy module has not initialised are left out.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if not is_lazy(param):
                    self.made_state(param)

    def made_state(self, param: Tensor) -> list[Tensor]:
        """Returns a parameter's states in the rule's order, allocated where it has none yet."""
        state = self.state[param]
        if "master_param" not in state:
            if offload := self.host.offload_of(param):
                state["master_param"] = offload.master(param)
            elif self.host.keeps_master(param):
                state["master_param"] = param.detach().to(torch.float32, copy=True)
        device = self.host.device_of(param)
        for name in self.description.state:
            if name not in state:
                dtype = self._state_dtype(name, param)
                with torch.inference_mode(False):  # it is stepped outside as well
                    state[name] = torch.zeros_like(param, dtype=dtype, device=device)
        return [state[name] for name in self.description.state]

    def _state_dtype(self, name: str, param: Tensor) -> torch.dtype:
        if param.dtype == torch.float64:
            return torch.float64
        return torch.float32 if name == "master_param" else self.state_dtypes[name]

    def group_hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the rule's keyword arguments for this group's coming step."""
        return {name: plain(value) for name, value in self._written(group).items()}

    def _written(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the group's hyperparameters, with what a scheduler wrote as the momentum."""
        values = {h.name: group[h.name] for h in self.description.hyperparameters}
        if self.description.momentum and MOMENTUM in group:
            values[self.description.momentum] = group[MOMENTUM]
        return values

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss, as in torch.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: lr is still None, or a rate or hyperparameter has come out of its range.
            RuntimeError: a sparse, complex or otherwise unusable gradient, a state that is not
                the parameter's (shape, dtype, device, layout), or a non-finite gradient under
                ``error_if_nonfinite``.  Every check precedes every change, so that a step is
                applied as a whole or not at all.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        Step(self, self._overlaps, self._logged).run()
        return loss

    def check_group(self, group: dict[str, Any]) -> None:
        """Takes over what a scheduler wrote as the momentum; ValueError for what no step takes."""
        values = self._values(group)
        for name, dtype in self.state_dtypes.items():
            if dtype != torch.float32:
                self.check_state_dtype(name, dtype, values)
        if values["lr"] is None:
            raise ValueError(
                "lr is None: give the optimizer a learning rate, or set one in each group"
            )
        if self.description.momentum and MOMENTUM in group:  # what a scheduler wrote
            group[self.description.momentum] = values[self.description.momentum]
            del group[MOMENTUM]
        for name in ("lr", "weight_decay"):
            value = group[name]
            if isinstance(value, Tensor) and value.device.type != "cpu":
                for param in group["params"]:
                    if param.device != value.device and param.grad is not None:
                        raise ValueError(
                            f"{name} is a tensor on {value.device}, and a parameter on "
                            f"{param.device}: keep it on the parameters' device or on the CPU"
                        )

    def state_dict(self) -> dict[str, Any]:
        """Returns what torch does, and a group's ``steps`` where its numbers of updates differ.

        That is a list beside ``params``; without it every parameter's number is the group's
        ``step``.
        """
        saved = super().state_dict()
        for index in self.counts.save(self.param_groups, saved["param_groups"]):
            saved["param_groups"][index]["format"] = FORMAT_WITH_STEPS
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads as torch does, hooks included, but only what fits, in the dtypes that are kept.

        A state that was saved in another dtype is converted, and a warning says so.

        Raises:
            ValueError: the state is another optimizer's or a newer version's, was made with a
                hyperparameter without which it has no meaning (``p``), or holds a tensor that is
                not a parameter's (shape, kind of dtype, layout).  Nothing is loaded then.
        """
        loading = Loading(self)
        hooks = (
            self.register_load_state_dict_pre_hook(loading.take),
            self.register_load_state_dict_post_hook(loading.put, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        if loading.converted:
            converted = ", ".join(sorted(loading.converted))
            warnings.warn(
                f"{self.description.label}: converted loaded state: {converted}", stacklevel=2
            )

    def place(self, name: str, param: Tensor) -> tuple[torch.device, torch.dtype]:
        """Returns where, and in which dtype, a state of a parameter is kept."""
        return self.host.device_of(param), self._state_dtype(name, param)
