"""NAdam as an element-wise optimizer of the plugin."""

import math
from typing import Annotated, Any

from typing_extensions import Unpack

from megatron_s3.optimizers.arguments import About, Options, Params, Rate, arguments
from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.description import Description
from megatron_s3.rules.nadam import nadam_update

__all__ = ["NAdam"]

#: The number of products of mu that are kept; a scheduler may change beta1 every step.
_MOST_KNOWN = 64


class NAdam(ElementwiseOptimizer):
    """NAdam; equal to torch.optim.NAdam(decoupled_weight_decay=True) within rounding.

    Arguments as for :class:`~megatron_s3.optimizers.base.ElementwiseOptimizer`, and the
    description's.
    """

    description = Description(
        name="nadam",
        label="NAdam",
        state=("exp_avg", "exp_avg_sq"),
        clip_grad=1.0,
        rule=nadam_update,
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
        momentum_decay: Annotated[
            float, About("speed at which the schedule of the momentum rises", 0)
        ] = 0.004,
        **options: Unpack[Options],
    ) -> None: ...

    def group_hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the rule's arguments; the schedule of mu is computed from the group's step."""
        values = super().group_hyperparameters(group)
        beta1, decay, step = values["beta1"], values.pop("momentum_decay"), group["step"]
        mu, following = (_mu(beta1, decay, t) for t in (step, step + 1))
        product = self._product(beta1, decay, step)
        values["weight_grad"] = (1 - mu) / (1 - product)
        values["weight_avg"] = following / (1 - product * following)
        values["correction2"] = 1 - values["beta2"] ** step
        return values

    def _product(self, beta1: float, decay: float, step: int) -> float:
        """Returns ``mu_1 ... mu_step``.

        It depends on the step alone, so a checkpoint does not hold it.  If the product of this or
        of the previous step is known, at most one factor is multiplied, also where parameters
        differ in their number of updates.
        """
        known: dict[tuple[float, float, int], float] = vars(self).setdefault("_known", {})
        at = next((t for t in (step, step - 1) if (beta1, decay, t) in known), 0)
        start = known.get((beta1, decay, at), 1.0)
        product = math.prod((_mu(beta1, decay, t) for t in range(at + 1, step + 1)), start=start)
        known[beta1, decay, step] = product
        for oldest in list(known)[:-_MOST_KNOWN]:
            known.pop(oldest, None)
        return product


def _mu(beta1: float, decay: float, step: int) -> float:
    return float(beta1 * (1 - 0.5 * 0.96 ** (step * decay)))
