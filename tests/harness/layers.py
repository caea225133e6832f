"""Megatron's own layers in the place of Transformer Engine's."""

import copy
from typing import Any

__all__ = ["accept_parts_of_a_sequence"]


def accept_parts_of_a_sequence() -> None:
    """Lets Megatron's torch norms work with sequence parallelism, as Transformer Engine's do.

    They refuse it, although its only trace in a norm is an attribute of its parameters.
    """
    from megatron.core.transformer import torch_norm

    original = torch_norm.WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        alone = copy.copy(config)
        alone.sequence_parallel = False
        norm = original(cls, alone, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = new
