"""State that is moved between devices, or reset, from outside of the optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["MovableState"]


class _Part:
    """The optimizer as a part of itself, for loops over ``sub_optimizers``."""

    def __init__(self, whole: Any) -> None:
        self.state = whole.state
        self.param_groups = whole.param_groups


class MovableState:
    """Methods that move or reset the whole state of an optimizer, whatever its tensors are called.

    Frameworks for reinforcement learning keep the state in the CPU's memory while another program
    uses the GPU.  The loops of verl and ms-swift know Adam's names alone, or, for an optimizer with
    the attributes ``sub_optimizers``, ``inner_param_to_orig_param`` and ``state`` (Megatron's
    HybridDeviceOptimizer has them), move every tensor, and call
    ``_move_new_state_to_right_device()`` on the way back.  These attributes are here.
    """

    #: No parameter of a part stands for another one.
    inner_param_to_orig_param: Mapping[Tensor, Tensor] = {}

    @property
    def sub_optimizers(self: Any) -> list[_Part]:
        """Returns one part, which has the optimizer's own state."""
        return [_Part(self)]

    def move_state(self: Any, device: torch.device | str | None = None) -> None:
        """Moves every state tensor, ``master_param`` included.

        Call it with no argument before the next step, which needs the states where it updates.

        Args:
            device: where to; None moves each state to where a step needs it.
        """
        for param, state in self.state.items():
            to = self.host.device_of(param) if device is None else device
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.to(to, non_blocking=True)

    def _move_new_state_to_right_device(self) -> None:
        self.move_state()

    @torch.no_grad()
    def reset_state(self: Any) -> None:
        """Sets every state and every number of updates to 0, as they are before the first step.

        A ``master_param`` is a parameter and stays as it is.
        """
        for state in self.state.values():
            for name in self.description.state:
                if name in state:
                    state[name].zero_()
        for group in self.param_groups:
            group["step"] = 0
        self.counts = type(self.counts)()
