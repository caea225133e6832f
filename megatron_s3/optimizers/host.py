"""Requests of the program around an optimizer, where that is more than a loop of steps."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_s3.kernels.statistics import Statistics
from megatron_s3.optimizers.offload import Offload

__all__ = ["Host"]


@dataclass
class Host:
    """The settings that a trainer such as Megatron's has made for an optimizer of its own.

    Attributes:
        master_params: whether half-precision parameters are but rounded copies of a float32
            ``master_param`` in their state.
        offload: of the parameters that the CPU updates, if any: their states are in its memory, and
            so is a ``master_param``.
        model_params: tensors that are given the new value of a parameter as well, rounded to their
            dtype; 1-d or of the parameter's shape.
        statistics: what every step's totals are added to, if anything.
        keep_hyperparameters: whether this process's hyperparameters (lr and weight decay aside) are
            kept when state is loaded.  torch's custom is that the saved ones win; where flags say
            what runs, the flags do.
        log_path: whether the log is told, once for each reason, that parameters need torch
            operations.
    """

    master_params: bool = False
    offload: Offload | None = None
    model_params: dict[Tensor, Tensor] = field(default_factory=dict)
    statistics: Statistics | None = None
    keep_hyperparameters: bool = False
    log_path: bool = True

    def offload_of(self, param: Tensor) -> Offload | None:
        """Returns what steps a parameter on the CPU, if that updates it."""
        return self.offload if self.offload is not None and param in self.offload.params else None

    def keeps_master(self, param: Tensor) -> bool:
        """Returns whether the parameter's state holds a ``master_param``."""
        if self.master_params and param.dtype in (torch.bfloat16, torch.float16):
            return True
        return self.offload_of(param) is not None

    def device_of(self, param: Tensor) -> torch.device:
        """Returns where the parameter's states are kept."""
        return param.device if self.offload_of(param) is None else torch.device("cpu")
