"""Adan as an element-wise optimizer of the plugin."""

from typing import Annotated, Any

from typing_extensions import Unpack

from megatron_s3.optimizers.arguments import About, Options, Params, Rate, arguments
from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.description import Description
from megatron_s3.rules.adan import adan_update

__all__ = ["Adan"]


class Adan(ElementwiseOptimizer):
    """Adan with decoupled weight decay; equal to pytorch_optimizer.Adan within rounding.

    Its state has four tensors of the parameter's size.  Arguments as for
    :class:`~megatron_s3.optimizers.base.ElementwiseOptimizer`, and the description's.
    """

    description = Description(
        name="adan",
        label="Adan",
        state=("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"),
        clip_grad=1.0,
        rule=adan_update,
        momentum="beta1",
    )

    @arguments
    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        *,
        beta1: Annotated[float, About("coefficient of the gradient's moving average", 0, 1)] = 0.98,
        beta2: Annotated[
            float, About("coefficient of the moving average of the gradient's change", 0, 1)
        ] = 0.92,
        beta3: Annotated[
            float, About("coefficient of the moving average in the denominator", 0, 1)
        ] = 0.99,
        eps: Annotated[float, About("added to the denominator", 0)] = 1e-08,
        **options: Unpack[Options],
    ) -> None: ...

    def group_hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the rule's arguments; the bias corrections are computed from the group's step."""
        values = super().group_hyperparameters(group)
        for i in ("1", "2", "3"):
            values["correction" + i] = 1 - values["beta" + i] ** group["step"]
        return values | {"first": group["step"] == 1}
