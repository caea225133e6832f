"""Statistics of a trainer's updates, by parameter type and layer, for the whole model.

Data are exchanged and read back only at the iterations that Megatron logs, by two all-reduces of a
few kilobytes: of all sums, and of all maxima.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_s3.kernels.operands import local
from megatron_s3.kernels.statistics import FIELDS, LARGEST, Statistics
from megatron_s3.telemetry.parameter_kinds import Layout
from megatron_s3.telemetry.updates import summary

__all__ = ["UpdateLog"]


class UpdateLog:
    """Counts the updates of a trainer's optimizers; each parameter of the model counts once.

    If several ranks update a parameter alike (replicated over data- or tensor-parallel ranks, or
    tied between pipeline stages), one of them counts it.

    Args:
        parts: Megatron's optimizers of this rank, which contain the plugin's.
        model_chunks: the model chunks of this rank.

    Attributes:
        layout: the layout of the rows.
        steps: updates since the last :meth:`take`.
    """

    def __init__(
        self, parts: Sequence[MegatronOptimizer], model_chunks: Sequence[torch.nn.Module]
    ) -> None:
        self.layout = Layout(_unwrapped(model_chunks[0]).config.num_layers)
        self.steps = 0
        self._optimizers = [part.optimizer for part in parts]
        device = torch.cuda.current_device()
        # One set of rows for each param group, since each has its own learning rate.
        groups = max(1, len(self._groups()))
        self._statistics = Statistics(device, groups * self.layout.rows)
        self._squared_rates = [0.0] * groups
        group_of = {p: i for i, group in enumerate(self._groups()) for p in group["params"]}
        #: The names of the groups' algorithms, equal on all ranks as the groups are.
        self._algorithms = sorted({group["algorithm"] for group in self._groups()})
        rows = _rows(self.layout, model_chunks)
        numel = torch.zeros(self.layout.rows + len(self._algorithms), dtype=torch.float64)
        for part in parts:
            part.optimizer.host.statistics = self._statistics
            for model_param, param in _pairs(part):
                row = rows[model_param] if _counts(part, model_param) else self.layout.uncounted
                self._statistics.rows[param] = group_of[param] * self.layout.rows + row
                count = local(param.detach()).numel()
                numel[row] += count
                if row != self.layout.uncounted:
                    name = self._groups()[group_of[param]]["algorithm"]
                    numel[self.layout.rows + self._algorithms.index(name)] += count
        numel = numel.to(device)
        torch.distributed.all_reduce(numel)
        self._numel = numel.tolist()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def rates(self) -> list[float]:
        """Returns the current learning rate of each param group."""
        return [float(group["lr"] or 0.0) for group in self._groups()]

    def count(self, rates: Sequence[float]) -> None:
        """Counts an update made with these :meth:`rates`."""
        self.steps += 1
        for i, rate in enumerate(rates):
            self._squared_rates[i] += rate**2

    def bound(self) -> float | None:
        """Returns the bound on the updates of all groups; None if one has no bound."""
        bounds = [
            description.bound(**{h.name: group[h.name] for h in description.hyperparameters})
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for description in [optimizer.algorithm_of(group).description]
        ]
        return None if None in bounds else max(bounds, default=None)

    def take(self) -> dict[str, dict[str, Any]]:
        """Returns the interval's :func:`~megatron_s3.telemetry.updates.summary`; collective."""
        by_group = self._with_algorithms(
            self._statistics.values.view(-1, self.layout.rows, len(FIELDS))
        )
        largest = by_group[:, :, LARGEST].amax(0)
        # The square of each group's learning rate, by the mean over the interval.
        mean_squares = by_group.new_tensor(self._squared_rates) / max(1, self.steps)
        squares = by_group[:, :, FIELDS.index("sum_sq_update")]
        moved = (squares * mean_squares[:, None]).sum(0)
        totals = torch.cat([by_group.sum(0), moved[:, None]], dim=1)
        self._statistics.values.zero_()
        self._squared_rates = [0.0] * len(self._squared_rates)
        handles = [
            torch.distributed.all_reduce(totals, async_op=True),
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, async_op=True),
        ]
        for handle in handles:
            handle.wait()
        totals[:, LARGEST] = largest
        steps, self.steps = self.steps, 0
        return summary(self.layout, totals.tolist(), self._numel, steps, self._algorithms)

    def _with_algorithms(self, by_group: Tensor) -> Tensor:
        """Returns each group's rows, and after them a row for each algorithm.

        In the row of its own algorithm a group has the totals of its parameters, and in the others
        0.
        """
        counted = by_group[:, : self.layout.uncounted]
        own = counted.sum(1)
        own[:, LARGEST] = counted[:, :, LARGEST].amax(1)
        names = [group["algorithm"] for group in self._groups()]
        added = by_group.new_zeros(len(by_group), len(self._algorithms), len(FIELDS))
        for i, name in enumerate(names):
            added[i, self._algorithms.index(name)] = own[i]
        return torch.cat([by_group, added], dim=1)


def _unwrapped(module: Any) -> Any:
    while hasattr(module, "module"):
        module = module.module
    return module


def _rows(layout: Layout, model_chunks: Iterable[torch.nn.Module]) -> dict[Tensor, int]:
    rows: dict[Tensor, int] = {}
    for chunk in model_chunks:
        model = _unwrapped(chunk)
        # Layers know their number in the whole model; it is passed on to their submodules.
        numbers = {
            name: module.layer_number - 1
            for name, module in model.named_modules()
            if isinstance(getattr(module, "layer_number", None), int)
        }
        for name, param in model.named_parameters():
            places = name.split(".")
            layers = (numbers.get(".".join(places[:i])) for i in range(1, len(places)))
            rows[param] = layout.row(name, next((n for n in layers if n is not None), None))
    return rows


def _pairs(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the model's parameters, each with the plugin's."""
    if hasattr(part, "model_and_own_params"):
        yield from part.model_and_own_params()
    else:  # in fp32 and without shards, they are the same
        yield from ((param, param) for param in part.get_parameters())


def _counts(part: MegatronOptimizer, param: Tensor) -> bool:
    """Returns whether this rank counts its updates of a parameter."""
    if not param_is_not_shared(param):
        return False
    if not tensor_parallel.param_is_not_tensor_parallel_duplicate(param):
        return False
    if isinstance(param, DTensor):  # a parameter of Megatron-FSDP or torch FSDP2
        coordinate = param.device_mesh.get_coordinate()
        assert coordinate is not None  # this rank has a part of the parameter
        places = zip(param.placements, coordinate, strict=True)
        return all(placement.is_shard() or rank == 0 for placement, rank in places)
    if isinstance(part, DistributedOptimizer):
        return bool(getattr(part, "distributed_optimizer_instance_id", 0) == 0)
    if getattr(param, "allreduce", True):
        return bool(parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)
    return bool(parallel_state.get_expert_data_parallel_rank() == 0)
