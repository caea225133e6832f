"""AdamW as an element-wise optimizer of the plugin."""

import math
from typing import Annotated, Any

from typing_extensions import Unpack

from megatron_s3.optimizers.arguments import About, Options, Params, Rate, arguments
from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.description import Description
from megatron_s3.rules.adamw import adamw_update
from megatron_s3.rules.s3 import s3_update_bound

__all__ = ["AdamW"]


def _bound(*, beta1: float, beta2: float, clip_update: float | None, **others: Any) -> float | None:
    """Returns Theorem 1's bound (7.27 for .9 and .999, 1.165 for .9 and .95), or the clip's."""
    bound = min(s3_update_bound(beta1, 2, beta2), math.inf if clip_update is None else clip_update)
    return None if math.isinf(bound) else bound


class AdamW(ElementwiseOptimizer):
    """AdamW with the plugin's sharding and kernels; equal to torch.optim.AdamW within rounding.

    In addition, ``clip_update`` bounds every element of the update ("AdamW with clipped updates",
    Figure 10 of the paper).  Arguments as for
    :class:`~megatron_s3.optimizers.base.ElementwiseOptimizer`, and the description's.
    """

    description = Description(
        name="adamw",
        label="AdamW",
        state=("exp_avg", "exp_avg_sq"),
        clip_grad=1.0,
        rule=adamw_update,
        bound=_bound,
        momentum="beta1",
    )

    @arguments
    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        *,
        beta1: Annotated[float, About("coefficient of the gradient's moving average", 0, 1)] = 0.9,
        beta2: Annotated[
            float, About("coefficient of the squared gradient's moving average", 0, 1)
        ] = 0.95,
        eps: Annotated[float, About("added to the denominator", 0)] = 1e-08,
        clip_update: Annotated[
            float | None, About("limit on each element of the update", 0)
        ] = None,
        **options: Unpack[Options],
    ) -> None: ...

    def group_hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the rule's arguments; the bias corrections are computed from the group's step."""
        values = super().group_hyperparameters(group)
        for i in ("1", "2"):
            values["correction" + i] = 1 - values["beta" + i] ** group["step"]
        return values
