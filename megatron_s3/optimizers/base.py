"""The base class of the plugin's optimizers: groups, state, checks, optimizer metadata."""

import difflib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from megatron_s3.kernels.compact import FRACTION, REMAINDER
from megatron_s3.optimizers.arguments import hyperparameters_of
from megatron_s3.optimizers.checks import (
    check_decay,
    largest,
    rate,
    shares_memory,
)
from megatron_s3.optimizers.counts import Counts
from megatron_s3.optimizers.description import (
    FORMAT,
    FORMAT_WITH_STEPS,
    RESERVED,
    Description,
    plain,
)
from megatron_s3.optimizers.host import Host
from megatron_s3.optimizers.loading import Loading
from megatron_s3.optimizers.movable import MovableState
from megatron_s3.optimizers.registry import OPTIMIZERS
from megatron_s3.optimizers.step import Past, Step
from megatron_s3.optimizers.torch_keywords import translated
from megatron_s3.optimizers.values import values

__all__ = ["ElementwiseOptimizer"]

#: The key to which torch's schedulers write the momentum, if the optimizer's defaults have it.
MOMENTUM = "momentum"

#: Arguments of the constructor that are not for a param group.
_FOR_WHOLE = {"error_if_nonfinite", "fused", "state_dtype"}


#: An object of each class whose algorithm a group of another class has, without parameters.
_ALGORITHMS: dict[type, "ElementwiseOptimizer"] = {}


class ElementwiseOptimizer(MovableState, torch.optim.Optimizer):
    """A :class:`torch.optim.Optimizer` whose update of an element depends on that element alone.

    A subclass defines its :attr:`description` and its constructor's arguments.  State tensors have
    their parameter's shape and layout.  Their dtype is float64 for float64 parameters and
    ``state_dtype`` for all others, so half-precision parameters have float32 states by default.  A
    param group also holds ``algorithm`` and ``format`` (the optimizer metadata that
    :meth:`load_state_dict` checks) and ``step`` (a Python int).  A group may be given the
    ``algorithm`` of another registered optimizer, with hyperparameters of that optimizer, whose
    rule then updates the group.  A gradient is read from
    ``param.decoupled_grad`` if that is set, which may have another dtype than the parameter, and
    else from ``param.grad``.  Parameters that torch shards (DTensors, as in FSDP2) have DTensors as
    states, and each rank updates its shard.

    Args:
        params: parameters or param groups, as in every torch optimizer.
        lr: learning rate, a number or a 0-dim tensor; None if every group gets one before the first
            step, as Megatron's schedulers do.
        weight_decay: decoupled weight decay (lambda).
        error_if_nonfinite: whether to check all gradients before a step and to raise RuntimeError
            if one holds NaN or inf, before anything is changed.  This costs a pass over the
            gradients and a host synchronization.  Without it, only such an element becomes NaN, in
            its state and its parameter, as with torch.optim.AdamW.
        fused: None uses the device's kernel if it can run, and else torch operations; True raises
            an error if the kernel cannot run; False always uses torch operations.
        state_dtype: the dtype of all states, or a dict of dtypes by name (float32 for the rest).
        **hyperparameters: the description's hyperparameters; the rest have their defaults.  Neutral
            keywords of torch.optim.AdamW (``foreach=None``, ``maximize=False``) and ``betas`` are
            taken too, see :mod:`megatron_s3.optimizers.torch_keywords`.

    Raises:
        TypeError: a hyperparameter is unknown.
        ValueError: a hyperparameter is out of range (here or in a group), a keyword of torch's asks
            for what the optimizer does not do, or a parameter is complex.
    """

    description: ClassVar[Description]

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        found = hyperparameters_of(cls.__init__)
        if found is not None and "__init__" in vars(cls):
            momentum, names = cls.description.momentum, [h.name for h in found]
            if momentum is not None and momentum not in names:
                raise TypeError(
                    f"{cls.__qualname__}: its description says momentum={momentum!r}, but its "
                    f"hyperparameters are {', '.join(names)}"
                )
            if momentum == MOMENTUM:  # schedulers find it by its own name
                momentum = None
            cls.description = replace(cls.description, hyperparameters=found, momentum=momentum)

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
        self.error_if_nonfinite = error_if_nonfinite
        self.fused = self._checked_fused(fused)
        #: The kernels of the last step: "C++ kernel", "Triton kernel", or "portable: " and the
        #: reason for torch operations; several, if only some parameters need torch operations.
        self.path = ""
        #: The settings that a trainer makes.
        self.host = Host()
        self._other_dtype = torch.float32
        if isinstance(state_dtype, torch.dtype):
            self._other_dtype = state_dtype
        #: The dtype of each state of the groups' algorithms, by name.
        self.state_dtypes = self._state_dtypes(state_dtype)
        hyperparameters = translated(self.description, hyperparameters)
        values = {h.name: h.default for h in self.description.hyperparameters}
        if unknown := sorted(set(hyperparameters) - set(values)):
            raise TypeError(
                f"{self.description.label} has no hyperparameter {', '.join(unknown)}; it has "
                f"{', '.join(values)}"
            )
        defaults = {"lr": lr, "weight_decay": weight_decay} | values | hyperparameters
        stamp = {"algorithm": self.description.name, "format": FORMAT}
        # Before the params are checked.
        self._values({"params": []} | defaults | stamp, most=math.inf)
        self._past = Past()
        #: The number of updates of each parameter for which it is not its group's ``step``.
        self.counts = Counts()
        if self.description.momentum:
            stamp[MOMENTUM] = defaults[self.description.momentum]
        super().__init__(params, defaults | stamp | {"step": 0})
        states = {n: None for d in self.descriptions() for n in d.state}
        if unknown := sorted(set(self.state_dtypes) - set(states)):
            raise ValueError(
                f"state_dtype names {', '.join(unknown)}, but the states of "
                f"{self.label} are {', '.join(states)}"
            )

    #: The constructor to which :func:`~megatron_s3.optimizers.arguments.arguments` passes them.
    construct = __init__

    def __getstate__(self) -> dict[str, Any]:
        # torch copies only its own three attributes; these are added or reset.
        own = ("error_if_nonfinite", "fused", "counts", "_other_dtype")
        state = super().__getstate__() | {name: getattr(self, name) for name in own}
        return state | {
            "_past": Past(),
            "state_dtypes": dict(self.state_dtypes),
            "host": replace(self.host, statistics=None, model_params={}),
            "path": "",
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # torch calls it while loading, too
        self.__dict__.setdefault("counts", Counts())
        self.__dict__.setdefault("_other_dtype", torch.float32)
        if "host" not in self.__dict__:  # pickled by an older version, which had them as attributes
            known = {f.name for f in fields(Host)} & self.__dict__.keys()
            self.host = Host(**{name: self.__dict__.pop(name) for name in known})
        if self.description.momentum:
            self.defaults.setdefault(MOMENTUM, self.defaults.get(self.description.momentum))
        for (
            group
        ) in self.param_groups:  # what an older version did not have, as in torch's optimizers
            group.setdefault("algorithm", self.description.name)
            for h in self.algorithm_of(group).description.hyperparameters:
                group.setdefault(h.name, h.default)
            group.setdefault("format", FORMAT)

    def _state_dtypes(
        self, given: torch.dtype | Mapping[str, torch.dtype]
    ) -> dict[str, torch.dtype]:
        names = self.description.state
        if isinstance(given, torch.dtype):
            return dict.fromkeys(names, given)
        if not isinstance(given, Mapping) or not all(
            isinstance(dtype, torch.dtype) for dtype in given.values()
        ):
            raise ValueError(
                "state_dtype must be a torch.dtype, or a dict of them by the states' names "
                f"({', '.join(names)}), not {given!r}"
            )
        return {**dict.fromkeys(names, torch.float32), **given}

    @property
    def label(self) -> str:
        """The names of all algorithms of the groups, for messages."""
        return " and ".join(description.label for description in self.descriptions())

    def descriptions(self) -> list[Description]:
        """Returns the descriptions of the groups' algorithms, this optimizer's own first.

        The others are sorted by name.
        """
        found = {group["algorithm"]: self.algorithm_of(group) for group in self.param_groups}
        found.pop(self.description.name, None)
        return [self.description, *(found[name].description for name in sorted(found))]

    def algorithm_of(self, group: Mapping[str, Any]) -> "ElementwiseOptimizer":
        """Returns an object with the description and the methods of a group's algorithm.

        It is this optimizer if the algorithm is its own, and else an object without parameters.

        Raises:
            ValueError: no registered optimizer has the name.
        """
        name = group["algorithm"]
        if name == self.description.name:
            return self
        try:
            cls: Any = OPTIMIZERS[name]
        except (KeyError, TypeError):
            raise ValueError(
                f"a param group has algorithm={name!r}, which is no optimizer of the plugin; they "
                f"are {', '.join(OPTIMIZERS)}"
            ) from None
        if cls not in _ALGORITHMS:
            _ALGORITHMS[cls] = cls.__new__(cls)
        return _ALGORITHMS[cls]

    @classmethod
    def check_state_dtype(
        cls, name: str, dtype: torch.dtype, hyperparameters: Mapping[str, Any]
    ) -> None:
        """Raises ValueError if a state cannot have this dtype.

        Args:
            name: the name of the state.
            dtype: the dtype to check.
            hyperparameters: the hyperparameters of a group.
        """
        if dtype != torch.float32:
            raise ValueError(f"{cls.description.label} keeps {name} in float32, not in {dtype}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does; raises ValueError and adds nothing if a value is invalid.

        A group with the ``algorithm`` of another optimizer has that optimizer's hyperparameters,
        at their defaults unless given; ``lr`` and ``weight_decay`` default to this optimizer's.
        """
        given: set[str] = set()
        if isinstance(param_group, dict):
            param_group = self._completed(param_group)
            given = set(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        algorithm = self.algorithm_of(group)
        own = {h.name for h in algorithm.description.hyperparameters}
        # Schedulers only need the momentum among the defaults.
        for name in {h.name for h in self.description.hyperparameters} | {MOMENTUM}:
            if name not in own and name not in given:
                group.pop(name, None)
        try:
            values = self._values(group)
            algorithm.check_hyperparameters(values)
            dtypes = {
                name: self.state_dtypes.get(name, self._other_dtype)
                for name in algorithm.description.state
            }
            for name, dtype in dtypes.items():
                algorithm.check_state_dtype(name, dtype, values)
            for param in group["params"]:
                algorithm._check_param(param)
        except ValueError:
            self.param_groups.pop()
            raise
        self.state_dtypes |= dtypes

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns a group with the hyperparameters of its algorithm, if that is given."""
        group = self._without_whole(group)
        if "algorithm" not in group:
            return translated(self.description, group)
        description = self.algorithm_of(group).description
        group = translated(description, group)
        own = {h.name: h.default for h in description.hyperparameters}
        others = {h.name for cls in OPTIMIZERS.values() for h in cls.description.hyperparameters}
        for name in group.keys() - own.keys() - {*RESERVED, MOMENTUM}:
            if name in others or difflib.get_close_matches(name, own, 1, 0.8):
                raise ValueError(
                    f"a param group with algorithm={description.name!r} has {name}, but "
                    f"{description.label} has no hyperparameter {name}; it has {', '.join(own)}"
                )
        return group if description.name == self.description.name else own | group

    @staticmethod
    def _checked_fused(fused: Any) -> bool | None:
        value: bool | None = plain(fused)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"fused must be True, False or None, not {fused!r}")
        return value

    def _without_whole(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns a group without settings of the whole optimizer, which it may only repeat.

        torchtitan passes ``fused`` in each group: the first group sets it if the constructor does
        not.
        """
        rest = dict(group)
        if self.fused is None and not self.param_groups:
            self.fused = self._checked_fused(group.get("fused"))
        for name in _FOR_WHOLE & group.keys():
            value = rest.pop(name)
            if isinstance(value, torch.dtype | Mapping):
                # The groups before may have states that are not this optimizer's own.
                same = self.state_dtypes | self._state_dtypes(value) == self.state_dtypes
            else:
                same = plain(value) is getattr(self, name, self.state_dtypes)
            if not same:
                raise ValueError(
                    f"a param group has {name}={value!r}, which is a setting of the whole "
                    "optimizer. Pass it to the constructor, or make a second optimizer for these "
                    "parameters"
                )
        return rest

    def check_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Raises ValueError if hyperparameters of a group exclude each other."""

    def _check_param(self, param: Tensor) -> None:
        if not param.is_floating_point():
            raise ValueError(
                f"{self.description.label} updates floating-point parameters, not "
                f"{param.dtype}; view a complex parameter with torch.view_as_real"
            )
        if not is_lazy(param) and shares_memory(param):
            raise ValueError(
                f"{self.description.label}: elements of a parameter of shape "
                f"{tuple(param.shape)} share memory (expand); pass the tensor that it is "
                "a view of"
            )

    def _values(self, group: dict[str, Any], most: float | None = None) -> dict[str, Any]:
        """Returns a group's learning rate, weight decay and hyperparameters, after checks."""
        if most is None:
            most = largest(group["params"])
        values = {name: rate(name, group[name], most) for name in ("lr", "weight_decay")}
        if values["weight_decay"] is None:
            raise ValueError("weight_decay must be a number, not None")
        check_decay(values["lr"], values["weight_decay"], most)
        algorithm = self.algorithm_of(group)
        written = algorithm._written(group)
        for h in algorithm.description.hyperparameters:
            values[h.name] = h.check(written[h.name], largest=most)
        return values

    def init_state(self) -> None:
        """Allocates the state (zeros) of every parameter that has none yet.

        Parameters that a lazy module has not initialized yet are skipped.
        """
        for group in self.param_groups:
            description = self.algorithm_of(group).description
            for param in group["params"]:
                if not is_lazy(param):
                    self.made_state(param, description)

    def made_state(self, param: Tensor, description: Description) -> list[Tensor]:
        """Returns a parameter's states in the rule's order, and allocates missing ones.

        Args:
            param: a parameter of the optimizer.
            description: the description of its group's algorithm.
        """
        state = self.state[param]
        if "master_param" not in state:
            if offload := self.host.offload_of(param):
                state["master_param"] = offload.master(param)
            elif self.host.keeps_remainder(param):
                with torch.inference_mode(False):
                    state["master_param"] = torch.zeros_like(param, dtype=REMAINDER)
            elif self.host.keeps_master(param):
                state["master_param"] = param.detach().to(torch.float32, copy=True)
        device = self.host.device_of(param)
        for name in description.state:
            if name not in state:
                dtype = self._state_dtype(name, param)
                with torch.inference_mode(False):  # steps outside of it use the state, too
                    state[name] = torch.zeros_like(param, dtype=dtype, device=device)
        return [state[name] for name in description.state]

    def _state_dtype(self, name: str, param: Tensor) -> torch.dtype:
        if param.dtype == torch.float64:
            return torch.float64
        if name == "master_param":
            return REMAINDER if self.host.keeps_remainder(param) else torch.float32
        return self.state_dtypes[name]

    def group_hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the rule's keyword arguments for the next step of a group of this algorithm."""
        return {name: plain(value) for name, value in self._written(group).items()}

    def _written(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the group's hyperparameters, with the momentum that a scheduler wrote."""
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
            ValueError: lr is still None, or lr, weight decay or a hyperparameter is out of range.
            RuntimeError: a gradient is unusable (sparse or complex, for example), a state does not
                fit its parameter (shape, dtype, device, layout), or a gradient is not finite and
                ``error_if_nonfinite`` is set.  All checks come before any change, so a step is
                applied completely or not at all.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        Step(self, self._past).run()
        return loss

    def check_group(self, group: dict[str, Any]) -> None:
        """Checks a group's values, and takes over the momentum that a scheduler wrote."""
        values = self._values(group)
        algorithm = self.algorithm_of(group)
        description = algorithm.description
        for name in description.state:
            if (dtype := self.state_dtypes[name]) != torch.float32:
                algorithm.check_state_dtype(name, dtype, values)
        if values["lr"] is None:
            raise ValueError(
                "lr is None: give the optimizer a learning rate, or set one in each group"
            )
        if description.momentum and MOMENTUM in group:  # what a scheduler wrote
            group[description.momentum] = values[description.momentum]
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
        """Returns torch's state dict, with ``steps`` in groups whose numbers of updates differ.

        ``steps`` is a list parallel to ``params``; without it, each parameter's number is the
        group's ``step``.  Its tensors hold values: those of states in int8 are copies in bfloat16
        (such groups have an entry ``fractions``), and those of ``master_param`` in int16 copies in
        float32.  All others are the optimizer's own.
        """
        hook = self.register_state_dict_post_hook(_put_values, prepend=True)
        try:  # before the caller's hooks, which may return anything
            return self.saved_groups()
        finally:
            hook.remove()

    def saved_groups(self) -> dict[str, Any]:
        """Returns :meth:`state_dict` with the tensors in the form in which they are stored."""
        hook = self.register_state_dict_post_hook(_complete_groups, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as torch does, with hooks, after checking that it fits.

        A state that was saved in another dtype is converted with a warning.  A main parameter that
        is stored in int16 also sets its parameter.

        Raises:
            ValueError: the state is of another optimizer or a newer version, was computed with
                another value of a hyperparameter that defines it (``p``), or holds a tensor that
                does not fit its parameter (shape, type of dtype, layout), or that exceeds the state
                of which int8 would hold fractions.  Nothing is loaded.
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
            warnings.warn(f"{self.label}: converted loaded state: {converted}", stacklevel=2)

    def place(self, name: str, param: Tensor) -> tuple[torch.device, torch.dtype]:
        """Returns the device and dtype of a parameter's state."""
        return self.host.device_of(param), self._state_dtype(name, param)


def _put_values(optimizer: Any, saved: dict[str, Any]) -> None:
    """Puts values in place of the states that are stored in another form."""
    states = saved["state"]
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        description = optimizer.algorithm_of(own).description
        for index, param in zip(group["params"], own["params"], strict=True):
            if index in states:
                states[index] = values(description, param, states[index])


def _complete_groups(optimizer: Any, saved: dict[str, Any]) -> None:
    """Adds to the saved groups what torch does not know."""
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        fractions = optimizer.algorithm_of(own).description.fractions
        stored = {n: of for n, of in fractions.items() if optimizer.state_dtypes.get(n) == FRACTION}
        if stored:
            group["fractions"] = stored
    for index in optimizer.counts.save(optimizer.param_groups, saved["param_groups"]):
        saved["param_groups"][index]["format"] = FORMAT_WITH_STEPS
