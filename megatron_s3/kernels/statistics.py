"""Statistics that a step computes without another pass over memory."""

import torch
from torch import Tensor

__all__ = ["FIELDS", "LARGE", "LARGEST", "Statistics", "of_chunk"]

#: The magnitude above which an update counts as large.
LARGE = 0.9

#: For the updates ``u``: the sum and the largest of ``|u|``, the sum of squares, and the number of
#: ``|u|`` above :data:`LARGE`, where a NaN counts as 0.  For the new parameters: the sum of
#: squares, where a NaN counts as 0.  For the gradients: the sum of squares of the finite elements,
#: the number of zeros, and the number of NaN or inf.
FIELDS = (
    "sum_abs_update",
    "max_abs_update",
    "sum_sq_update",
    "large_updates",
    "sum_sq_param",
    "sum_sq_grad",
    "zero_grads",
    "nonfinite_grads",
)
#: Column of the maximum, the only one that is not a sum.
LARGEST = FIELDS.index("max_abs_update")


class Statistics:
    """Running totals over the steps since they were last taken, in one or more rows.

    Args:
        device: the parameters' device.
        rows: the number of parameter types that have totals of their own.

    Attributes:
        values: the totals: float64, (rows, 8), on the device, columns in the order of
            :data:`FIELDS`.
        rows: the row to which a parameter of the optimizer adds; 0 for parameters not in it.
    """

    def __init__(self, device: torch.device | str | int, rows: int = 1) -> None:
        self.values = torch.zeros(rows, len(FIELDS), dtype=torch.float64, device=device)
        self.rows: dict[Tensor, int] = {}

    def add(self, partials: Tensor, rows: Tensor) -> None:
        """Adds the totals of chunks, without synchronizing with the host.

        Args:
            partials: (chunks, 8), any floating dtype.
            rows: the row of each chunk: int64, (chunks,), on the device.
        """
        if partials.shape[0] == 0:
            return
        partials = partials.to(self.values)
        largest = self.values[:, LARGEST].scatter_reduce(0, rows, partials[:, LARGEST], "amax")
        self.values.index_add_(0, rows, partials)
        self.values[:, LARGEST] = largest

    def absorb(self, other: "Statistics") -> None:
        """Adds the totals of another object, on any device, and resets them to 0."""
        values = other.values.to(self.values.device, copy=True)
        largest = torch.maximum(self.values[:, LARGEST], values[:, LARGEST])
        self.values += values
        self.values[:, LARGEST] = largest
        other.values.zero_()

    def take(self) -> list[dict[str, float]]:
        """Returns the totals of each row by name and resets them to 0; it waits for the device."""
        values = [dict(zip(FIELDS, row, strict=True)) for row in self.values.tolist()]
        self.values.zero_()
        return values


def of_chunk(update: Tensor, grad: Tensor, param: Tensor) -> Tensor:
    """Returns the totals of a chunk for :meth:`Statistics.add`, float64, (1, 8).

    Args:
        update: ``u``.
        grad: the gradient.
        param: the new parameter.  All three have the same size and are not empty.
    """
    magnitude = update.abs().nan_to_num_(nan=0.0, posinf=torch.inf)
    finite = grad.isfinite()
    return torch.stack(
        [
            magnitude.sum(dtype=torch.float64),
            magnitude.amax().double(),
            magnitude.double().square_().sum(),
            (magnitude > LARGE).sum().double(),
            param.double()
            .nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
            .square_()
            .sum(),
            grad.double().masked_fill_(~finite, 0).square_().sum(),
            (grad == 0).sum().double(),
            (~finite).sum().double(),
        ]
    )[None]
