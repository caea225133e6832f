"""Settings of an optimizer that a trainer makes, such as Megatron's."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_s3.kernels.statistics import Statistics
from megatron_s3.optimizers.offload import Offload

__all__ = ["Host"]


@dataclass
class Host:
    """The settings that a trainer makes for its optimizer.

    Attributes:
        master_params: whether half-precision parameters are rounded copies of a float32
            ``master_param`` in their state.
        remainders: whether the ``master_param`` of a bfloat16 parameter is stored as what the
            parameter lacks of it, in int16 (see :mod:`megatron_s3.kernels.compact`); not with
            ``offload``.
        offload: the parameters that the CPU updates, if any; their states and ``master_param`` are
            in the CPU's memory.
        model_params: for each parameter, a tensor that also receives its new value, rounded to its
            own dtype; it is 1-d or has the parameter's shape.
        statistics: the statistics to which every step adds its totals, or None.
        keep_hyperparameters: whether the hyperparameters of this process (except lr and weight
            decay) are kept when a state is loaded.  In torch the saved ones are used; in a trainer
            with flags, the flags decide.
        log_path: whether a warning is logged, once for each reason, if parameters need torch
            operations.
    """

    master_params: bool = False
    remainders: bool = False
    offload: Offload | None = None
    model_params: dict[Tensor, Tensor] = field(default_factory=dict)
    statistics: Statistics | None = None
    keep_hyperparameters: bool = False
    log_path: bool = True

    def offload_of(self, param: Tensor) -> Offload | None:
        """Returns the offload of a parameter that the CPU updates, or None."""
        return self.offload if self.offload is not None and param in self.offload.params else None

    def keeps_master(self, param: Tensor) -> bool:
        """Returns whether the parameter's state holds a ``master_param``."""
        if self.master_params and param.dtype in (torch.bfloat16, torch.float16):
            return True
        return self.offload_of(param) is not None

    def keeps_remainder(self, param: Tensor) -> bool:
        """Returns whether the ``master_param`` in the parameter's state is stored in int16."""
        return self.remainders and self.master_params and param.dtype == torch.bfloat16

    def device_of(self, param: Tensor) -> torch.device:
        """Returns the device of the parameter's states."""
        return param.device if self.offload_of(param) is None else torch.device("cpu")
