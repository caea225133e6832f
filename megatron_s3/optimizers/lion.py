"""Lion as an element-wise optimizer of the plugin."""

from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.description import KERNELS, Description, Hyperparameter
from megatron_s3.rules.lion import lion_update

__all__ = ["Lion"]


class Lion(ElementwiseOptimizer):
    """Lion, for every parameter alike.

    Arguments as for :class:`~megatron_s3.optimizers.base.ElementwiseOptimizer`, and the
    description's.
    """

    description = Description(
        name="lion",
        label="Lion",
        state=("exp_avg",),
        hyperparameters=(
            Hyperparameter("beta1", 0.95, "coefficient of the momentum in the update", 0, 1),
            Hyperparameter("beta2", 0.98, "coefficient of the momentum", 0, 1),
        ),
        clip_grad=1.0,
        rule=lion_update,
        bound=lambda **hyperparameters: 1.0,
        momentum="beta1",
        kernels=KERNELS,
    )
