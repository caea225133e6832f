"""SignSGD as an element-wise optimizer of the plugin."""

from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.description import KERNELS, Description, Hyperparameter
from megatron_s3.rules.sign_sgd import sign_sgd_update

__all__ = ["SignSGD"]


class SignSGD(ElementwiseOptimizer):
    """SignSGD with momentum (Signum); ``momentum=0`` is SignSGD itself.

    Arguments as for :class:`~megatron_s3.optimizers.base.ElementwiseOptimizer`, and the
    description's.
    """

    description = Description(
        name="signsgd",
        label="SignSGD",
        state=("exp_avg",),
        hyperparameters=(
            Hyperparameter("momentum", 0.95, "coefficient of the momentum; 0 for none", 0, 1),
        ),
        clip_grad=1.0,
        rule=sign_sgd_update,
        bound=lambda **hyperparameters: 1.0,
        kernels=KERNELS,
    )
