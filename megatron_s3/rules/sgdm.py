"""SGD with momentum (torch.optim.SGD), with decoupled weight decay."""

from torch import Tensor

from megatron_s3.rules.kernel_form import KernelForm, with_kernel

__all__ = ["sgdm_update"]


def _kernel_numbers(*, momentum: float, nesterov: bool) -> dict[str, float]:
    return {"momentum": momentum, "nesterov": nesterov}


@with_kernel(
    KernelForm(
        "sgdm", states=1, scalars=("momentum",), flags={"nesterov": 1}, numbers=_kernel_numbers
    )
)
def sgdm_update(
    grad: Tensor, momentum_buffer: Tensor, *, momentum: float, nesterov: bool
) -> Tensor:
    """Updates the momentum with one gradient and returns it, or Nesterov's combination.

    Args:
        grad: the gradient; float32 or float64, any shape.
        momentum_buffer: ``v``, updated in place to ``momentum v + g``.
        momentum: its coefficient.
        nesterov: whether to return ``g + momentum v`` instead of ``v``.
    """
    momentum_buffer.mul_(momentum).add_(grad)
    return (momentum_buffer * momentum).add_(grad) if nesterov else momentum_buffer.clone()
