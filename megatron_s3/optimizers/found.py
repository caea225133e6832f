"""The tensors of a step, and the memory in which they lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress, repeat
from operator import attrgetter, is_, not_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

__all__ = ["Found", "Spot"]

_PLAIN = {Tensor, Parameter}
_dtype = attrgetter("dtype")


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors of a step.

    Attributes:
        missing: for each group, which of its parameters have no gradient.
        params: the other parameters of all groups, in order.
        grads: their gradients.
        states: their states, with any names.
        models: their copies in the model, where they have one.
    """

    missing: list[list[bool]]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    models: list[Tensor | None]

    @classmethod
    def of(cls, optimizer: Any) -> "Found":
        """Returns the tensors of an optimizer's next step, without a check of any."""
        missing: list[list[bool]] = []
        params: list[Tensor] = []
        grads: list[Any] = []
        for group in optimizer.param_groups:
            its: list[Tensor] = group["params"]
            found = [
                param.grad if (other := getattr(param, "decoupled_grad", None)) is None else other
                for param in its
            ]
            lacking = list(map(is_, found, repeat(None)))
            if True in lacking:
                having = list(map(not_, lacking))
                its, found = list(compress(its, having)), list(compress(found, having))
            missing.append(lacking)
            params += its
            grads += found
        states = _of_each(optimizer.state, params, {})
        models = optimizer.host.model_params
        return cls(missing, params, grads, states, _of_each(models, params) if models else [])

    @property
    def names(self) -> tuple[list[tuple[str, ...]], list[bool]]:
        """The names of each parameter's states, and whether it has no copy in the model."""
        return list(map(tuple, self.states)), list(map(is_, self.models, repeat(None)))

    @property
    def written(self) -> list[Tensor]:
        """All tensors that the step may write."""
        states = chain.from_iterable(map(dict.values, self.states))
        return [*self.params, *states, *(model for model in self.models if model is not None)]

    def note_writes(self) -> None:
        """Lets autograd notice that tensors that it may have saved have changed."""
        masters = [state["master_param"] for state in self.states if "master_param" in state]
        models = [model for model in self.models if model is not None]
        increment_version(self.params + masters + models)


def _of_each(mapping: Mapping[Tensor, Any], params: Sequence[Tensor], default: Any = None) -> Any:
    """Returns the values of these keys; in their order, which is usual, no key is looked up."""
    if len(mapping) == len(params) and all(map(is_, mapping, params)):
        return list(mapping.values())
    return list(map(mapping.get, params, repeat(default)))


@dataclass(frozen=True, slots=True)
class Spot:
    """All that decides in which memory a kernel finds the elements of plain tensors.

    Tensors are told apart by it, not by their identity: another tensor in the same place serves as
    well, and no tensor is kept from being freed.
    """

    types: list[type]
    addresses: list[int]
    dtypes: list[torch.dtype]
    sizes: list[torch.Size]
    contiguous: list[bool]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Spot | None":
        """Returns the place of tensors; None if one of them is of another class than torch's."""
        types = list(map(type, tensors))
        if not _PLAIN.issuperset(types):
            return None
        try:
            addresses = list(map(Tensor.data_ptr, tensors))
        except RuntimeError:  # it is sparse, or of another layout without an address
            return None
        return cls(
            types,
            addresses,
            list(map(_dtype, tensors)),
            list(map(Tensor.size, tensors)),
            list(map(Tensor.is_contiguous, tensors)),
        )
