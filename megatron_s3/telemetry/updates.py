"""Statistics of the updates of an interval, from the totals that the optimizers count."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_s3.kernels.statistics import FIELDS
from megatron_s3.telemetry.parameter_kinds import Layout

__all__ = ["rising", "sizes", "summary", "tags"]

Sizes = Mapping[str, Mapping[str, float]]


def summary(
    layout: Layout,
    totals: Sequence[Sequence[float]],
    numel: Sequence[float],
    steps: int,
    optimizers: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Returns statistics of the whole model, and of each parameter type and layer in it.

    If several optimizers update the model, there are also statistics of each.

    Args:
        layout: the layout of the rows.
        totals: for each row, :data:`~megatron_s3.kernels.statistics.FIELDS` and the sum of squares
            of the parameters' changes (learning rate times u), summed over ranks and the steps of
            the interval; of the maximum, the largest.
        numel: number of parameters of each row, over all ranks.
        steps: number of updates in the interval.
        optimizers: the names of the optimizers, each of which has a row after those of the layout.

    Returns:
        ``{"all": S, "kinds": {type: S}, "layers": {index: S}}``, and ``"optimizers": {name: S}`` if
        there are several, where S holds ``numel``;
        ``mean_abs``, ``max_abs``, ``share_large`` (the fraction with |u| > 0.9) and ``rms`` of the
        updates u; ``weight_ratio``, the RMS of the parameters' changes divided by the RMS of the
        parameters; ``grad_rms``; and the counts ``zero_grads`` and ``nonfinite_grads``.  Means are
        over elements and steps.
    """
    names = (*FIELDS, "sum_sq_move")

    def of(rows: Sequence[int]) -> dict[str, float]:
        columns = dict(zip(names, zip(*(totals[r] for r in rows), strict=True), strict=True))
        count = sum(numel[r] for r in rows)
        each = max(1.0, count * steps)
        rms_move = math.sqrt(sum(columns["sum_sq_move"]) / each)
        rms_param = math.sqrt(sum(columns["sum_sq_param"]) / each)
        return {
            "numel": int(count),
            "mean_abs": sum(columns["sum_abs_update"]) / each,
            "max_abs": max(columns["max_abs_update"]),
            "share_large": sum(columns["large_updates"]) / each,
            "rms": math.sqrt(sum(columns["sum_sq_update"]) / each),
            "weight_ratio": rms_move / rms_param if rms_param else 0.0,
            "grad_rms": math.sqrt(sum(columns["sum_sq_grad"]) / each),
            "zero_grads": int(sum(columns["zero_grads"])),
            "nonfinite_grads": int(sum(columns["nonfinite_grads"])),
        }

    def present(groups: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
        return {name: of(rows) for name, rows in groups.items() if any(numel[r] for r in rows)}

    found: dict[str, dict[str, Any]] = {
        "all": of(range(layout.uncounted)),
        "kinds": present(layout.kinds()),
        "layers": present(layout.by_layer()),
    }
    if len(optimizers) > 1:
        found["optimizers"] = present(
            {name: [layout.rows + place] for place, name in enumerate(optimizers)}
        )
    return found


def sizes(updates: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the mean |u| of each parameter type and layer of a :func:`summary`."""
    return {
        group: {name: values["mean_abs"] for name, values in updates[group].items()}
        for group in ("layers", "kinds")
    }


def rising(history: Sequence[Sizes], now: Sizes, most: int = 5) -> list[str]:
    """Returns the parameter types and layers whose mean |u| has risen most above its median.

    Args:
        history: :func:`sizes` of earlier intervals, in order.
        now: :func:`sizes` of the interval in which a spike began, or of the one before it.
        most: the most names that are returned.

    Returns:
        Names and factors such as ``["layer 3 x2.1", "attention.qkv x1.8"]``, the highest first;
        those that have risen by less than a quarter are left out.
    """
    found = []
    for group, prefix in (("layers", "layer "), ("kinds", "")):
        for name, size in now[group].items():
            before = [h[group][name] for h in history if name in h[group]]
            usual = statistics.median(before) if before else 0.0
            if usual and size > 1.25 * usual:
                found.append((size / usual, prefix + name))
    return [f"{name} x{ratio:.1f}" for ratio, name in sorted(found, reverse=True)[:most]]


def tags(updates: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns the scalars of a :func:`summary` for TensorBoard."""
    names = ("mean_abs", "max_abs", "share_large", "rms", "weight_ratio", "grad_rms")
    found = {f"update/{name}": updates["all"][name] for name in names}
    for kind, values in updates["kinds"].items():
        found |= {f"update/{name}/{kind}": values[name] for name in names[:2]}
    for optimizer, values in updates.get("optimizers", {}).items():
        found |= {f"update/{name}/optimizer {optimizer}": values[name] for name in names}
    return found
