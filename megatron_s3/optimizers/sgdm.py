"""SGD with momentum as an element-wise optimizer of the plugin."""

from typing import Annotated

from typing_extensions import Unpack

from megatron_s3.optimizers.arguments import About, Options, Params, Rate, arguments
from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.description import Description
from megatron_s3.rules.sgdm import sgdm_update

__all__ = ["SGDM"]


class SGDM(ElementwiseOptimizer):
    """SGD with momentum as in torch.optim.SGD, with decoupled weight decay instead of L2.

    Arguments as for :class:`~megatron_s3.optimizers.base.ElementwiseOptimizer`, and the
    description's.
    """

    description = Description(
        name="sgdm",
        label="SGD with momentum",
        state=("momentum_buffer",),
        clip_grad=1.0,
        rule=sgdm_update,
    )

    @arguments
    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        *,
        momentum: Annotated[float, About("coefficient of the momentum", 0, 1)] = 0.9,
        nesterov: Annotated[bool, About("use Nesterov momentum")] = False,
        **options: Unpack[Options],
    ) -> None: ...
