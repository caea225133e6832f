"""A user's own optimizer in Megatron: the README's example, and the real trainer."""

import torch

import megatron_s3
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer
from megatron_s3.optimizers.description import Description, Hyperparameter


def tanh_update(grad: torch.Tensor, exp_avg: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Advances the state in place and returns the update u, of the gradient's shape."""
    exp_avg.mul_(beta).add_(grad * (1 - beta))
    return torch.tanh(exp_avg * 1e3)


class TanhMomentum(ElementwiseOptimizer):
    """The momentum, squashed."""

    description = Description(
        name="tanh",
        label="tanh of the momentum",
        state=("exp_avg",),
        hyperparameters=(Hyperparameter("beta", 0.9, "coefficient of the momentum", 0, 1),),
        clip_grad=1.0,
        rule=tanh_update,
    )


OPTIMIZERS["tanh"] = TanhMomentum
megatron_s3.register()

if __name__ == "__main__":
    from megatron_s3.pretrain_gpt import main

    main()
