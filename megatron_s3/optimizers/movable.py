"""Methods with which other programs move or reset the state of an optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["MovableState"]


class _Part:
    """A view of the whole optimizer, as the only item of ``sub_optimizers``."""

    def __init__(self, whole: Any) -> None:
        self.state = whole.state
        self.param_groups = whole.param_groups


class MovableState:
    """Methods that move or reset the whole state of an optimizer, independent of the states' names.

    Frameworks for reinforcement learning keep the state in CPU memory while another program uses
    the GPU.  verl and ms-swift move only states with the names of Adam's.  But if an optimizer has
    the attributes ``sub_optimizers``, ``inner_param_to_orig_param`` and ``state``, as Megatron's
    HybridDeviceOptimizer has, they move every tensor, and call
    ``_move_new_state_to_right_device()`` to move them back.  This class provides these attributes.
    """

    #: Empty, because ``param_groups`` contains the original parameters.
    inner_param_to_orig_param: Mapping[Tensor, Tensor] = {}

    @property
    def sub_optimizers(self: Any) -> list[_Part]:
        """Returns a list of one item, which has the optimizer's own state and param groups."""
        return [_Part(self)]

    def move_state(self: Any, device: torch.device | str | None = None) -> None:
        """Moves every state tensor, ``master_param`` included.

        Call it without an argument before the next step, which needs the state on its device.

        Args:
            device: the target device; None moves each state to the device that a step needs.
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
        """Sets all states and step counts to 0, as before the first step.

        ``master_param`` is a parameter and does not change.
        """
        names = {name for description in self.descriptions() for name in description.state}
        for state in self.state.values():
            for name in names & state.keys():
                state[name].zero_()
        for group in self.param_groups:
            group["step"] = 0
        self.counts = type(self.counts)()
