"""A user's own optimizer in Megatron: the README's example, and the real trainer."""

from typing import Annotated

import torch
from typing_extensions import Unpack

import megatron_s3
from megatron_s3.optimizers import ElementwiseOptimizer, register
from megatron_s3.optimizers.arguments import About, Options, Params, Rate, arguments
from megatron_s3.optimizers.description import Description


def tanh_update(grad: torch.Tensor, exp_avg: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Advances the state in place and returns the update u, of the gradient's shape."""
    exp_avg.mul_(beta).add_(grad * (1 - beta))
    return torch.tanh(exp_avg * 1e3)


@register
class TanhMomentum(ElementwiseOptimizer):
    """The momentum, squashed."""

    description = Description(
        name="tanh",
        label="tanh of the momentum",
        state=("exp_avg",),
        clip_grad=1.0,
        rule=tanh_update,
    )

    @arguments
    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        *,
        beta: Annotated[float, About("coefficient of the momentum", 0, 1)] = 0.9,
        **options: Unpack[Options],
    ) -> None: ...


megatron_s3.register()

if __name__ == "__main__":
    from megatron_s3.pretrain_gpt import main

    main()
