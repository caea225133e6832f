"""AdEMAMix (Pagliardini et al., 2024): an optimizer that a user adds, in one file."""

from typing import Annotated, Any

from torch import Tensor
from typing_extensions import Unpack

from megatron_s3.optimizers import ElementwiseOptimizer, register
from megatron_s3.optimizers.arguments import About, Options, Params, Rate, arguments
from megatron_s3.optimizers.description import Description
from megatron_s3.rules.roots import square_root


def ademamix_update(
    grad: Tensor, exp_avg: Tensor, exp_avg_slow: Tensor, exp_avg_sq: Tensor, *,
    beta1: float, beta2: float, beta3: float, alpha: float, eps: float,
    correction1: float, correction2: float,
) -> Tensor:  # fmt: skip
    """Advances the state and returns ``(m1 / c1 + alpha m2) / (sqrt(v / c2) + eps)``."""
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    exp_avg_slow.mul_(beta3).add_(grad * (1 - beta3))
    exp_avg_sq.mul_(beta2).add_(grad.square().mul_(1 - beta2))
    denominator = square_root(exp_avg_sq * (1 / correction2)).add_(eps)
    return exp_avg.mul(1 / correction1).add_(exp_avg_slow * alpha).div_(denominator)


@register
class AdEMAMix(ElementwiseOptimizer):
    """Adam with a second, much slower average of the gradient."""

    description = Description(
        name="ademamix",
        label="AdEMAMix",
        state=("exp_avg", "exp_avg_slow", "exp_avg_sq"),
        clip_grad=1.0,
        rule=ademamix_update,
        momentum="beta1",
    )

    @arguments
    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        *,
        beta1: Annotated[float, About("coefficient of the fast average", 0, 1)] = 0.9,
        beta2: Annotated[float, About("coefficient of the squared gradient", 0, 1)] = 0.999,
        beta3: Annotated[float, About("coefficient of the slow average", 0, 1)] = 0.9999,
        alpha: Annotated[float, About("weight of the slow average", 0)] = 5.0,
        eps: Annotated[float, About("added to the denominator", 0)] = 1e-8,
        **options: Unpack[Options],
    ) -> None: ...

    def group_hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the rule's numbers of this step."""
        values = super().group_hyperparameters(group)
        corrections = {f"correction{i}": 1 - values[f"beta{i}"] ** group["step"] for i in (1, 2)}
        return values | corrections
