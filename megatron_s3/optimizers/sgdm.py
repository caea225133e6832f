"""SGD with momentum as an element-wise optimizer of the plugin."""

from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.description import KERNELS, Description, Hyperparameter
from megatron_s3.rules.sgd import sgd_update

__all__ = ["SGDM"]


class SGDM(ElementwiseOptimizer):
    """SGD with momentum: torch.optim.SGD's, with decoupled weight decay instead of L2.

    Arguments as for :class:`~megatron_s3.optimizers.base.ElementwiseOptimizer`, and the
    description's.
    """

    description = Description(
        name="sgdm",
        label="SGD with momentum",
        state=("momentum_buffer",),
        hyperparameters=(
            Hyperparameter("momentum", 0.9, "coefficient of the momentum", 0, 1),
            Hyperparameter("nesterov", False, "Nesterov momentum"),
        ),
        clip_grad=1.0,
        rule=sgd_update,
        kernels=KERNELS,
    )
