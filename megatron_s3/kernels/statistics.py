"""What a step can count on its way, at no extra pass over memory."""

import torch
from torch import Tensor

__all__ = ["FIELDS", "Statistics", "of_chunk"]

#: Of the updates ``u``: sum and largest of ``|u|``, a NaN counting 0; of the gradients: sum of the
#: squares of what is finite, how many are 0, how many are NaN or inf.
FIELDS = (
    "sum_abs_update",
    "max_abs_update",
    "sum_sq_grad",
    "zero_grads",
    "nonfinite_grads",
)
_LARGEST = FIELDS.index("max_abs_update")


class Statistics:
    """Running totals over the steps since they were last taken.

    Attributes:
        values: float64, (5,), on the device, in the order of :data:`FIELDS`.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.values = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)

    def add(self, partials: Tensor) -> None:
        """Adds the totals of chunks; no host synchronisation.

        Args:
            partials: (chunks, 5), any floating dtype.
        """
        if partials.shape[0] == 0:
            return
        partials = partials.to(self.values)
        largest = torch.maximum(self.values[_LARGEST], partials[:, _LARGEST].amax())
        self.values += partials.sum(dim=0)
        self.values[_LARGEST] = largest

    def take(self) -> dict[str, float]:
        """The totals by name, which begin again at 0; waits for the device."""
        values = dict(zip(FIELDS, self.values.tolist(), strict=True))
        self.values.zero_()
        return values


def of_chunk(update: Tensor, grad: Tensor) -> Tensor:
    """One row for :meth:`Statistics.add`, float64, (5,)."""
    magnitude = update.abs().nan_to_num_(nan=0.0, posinf=torch.inf)
    finite = grad.isfinite()
    return torch.stack(
        [
            magnitude.sum(dtype=torch.float64),
            magnitude.amax().double(),
            grad.double().masked_fill_(~finite, 0).square_().sum(),
            (grad == 0).sum().double(),
            (~finite).sum().double(),
        ]
    )
