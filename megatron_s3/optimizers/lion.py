"""Lion as an element-wise optimizer of the plugin."""

from typing import Annotated

from typing_extensions import Unpack

from megatron_s3.optimizers.arguments import About, Options, Params, Rate, arguments
from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.description import Description
from megatron_s3.rules.lion import lion_update

__all__ = ["Lion"]


class Lion(ElementwiseOptimizer):
    """Lion, applied to every parameter.

    Arguments as for :class:`~megatron_s3.optimizers.base.ElementwiseOptimizer`, and the
    description's.
    """

    description = Description(
        name="lion",
        label="Lion",
        state=("exp_avg",),
        clip_grad=1.0,
        rule=lion_update,
        bound=lambda **hyperparameters: 1.0,
        momentum="beta1",
    )

    @arguments
    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        *,
        beta1: Annotated[float, About("coefficient of the momentum in the update", 0, 1)] = 0.95,
        beta2: Annotated[float, About("coefficient of the momentum", 0, 1)] = 0.98,
        **options: Unpack[Options],
    ) -> None: ...
