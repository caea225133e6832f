"""SignSGD as an element-wise optimizer of the plugin."""

from typing import Annotated

from typing_extensions import Unpack

from megatron_s3.optimizers.arguments import About, Options, Params, Rate, arguments
from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.description import Description
from megatron_s3.rules.signsgd import signsgd_update

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
        clip_grad=1.0,
        rule=signsgd_update,
        bound=lambda **hyperparameters: 1.0,
    )

    @arguments
    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        *,
        momentum: Annotated[
            float, About("coefficient of the momentum; 0 disables it", 0, 1)
        ] = 0.95,
        **options: Unpack[Options],
    ) -> None: ...
