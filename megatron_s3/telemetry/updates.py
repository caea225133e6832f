"""The figures of an interval's updates, made of the totals that optimizers count."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_s3.kernels.statistics import FIELDS
from megatron_s3.telemetry.parameter_kinds import Layout

__all__ = ["rising", "sizes", "summary", "tags"]

Sizes = Mapping[str, Mapping[str, float]]


def summary(
    layout: Layout, totals: Sequence[Sequence[float]], numel: Sequence[float], steps: int
) -> dict[str, dict[str, Any]]:
    """Returns figures of the whole model, each kind and each layer that has parameters.

    Args:
        layout: of the rows.
        totals: of each row :data:`~megatron_s3.kernels.statistics.FIELDS`, then the sum of the
            squares of what the parameters were moved by, learning rate times u; summed (the
            maximum: the largest) over ranks and the interval's steps.
        numel: parameters of each row, over all ranks.
        steps: updates in the interval.

    Returns:
        ``{"all": S, "kinds": {kind: S}, "layers": {number: S}}``, where S holds ``numel``; of the
        updates u ``mean_abs``, ``max_abs``, ``share_large`` (|u| > 0.9) and ``rms``;
        ``weight_ratio``, the RMS of what the parameters were moved by over their own; ``grad_rms``;
        ``zero_grads`` and ``nonfinite_grads``, how many in the interval.  Rates are per element and
        step.
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

    return {
        "all": of(range(layout.uncounted)),
        "kinds": present(layout.kinds()),
        "layers": present(layout.by_layer()),
    }


def sizes(updates: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean |u| of each kind and each layer of a :func:`summary`, and nothing else."""
    return {
        group: {name: values["mean_abs"] for name, values in updates[group].items()}
        for group in ("layers", "kinds")
    }


def rising(history: Sequence[Sizes], now: Sizes, most: int = 5) -> list[str]:
    """Returns the kinds and layers whose mean |u| has risen most over its median before.

    Args:
        history: :func:`sizes` of earlier intervals, the one before last at the end of it.
        now: those of the interval in which a spike began, or of the one before.
        most: how many are named.

    Returns:
        Such as ``["layer 3 x2.1", "attention.qkv x1.8"]``, the highest first; those that have
        risen by less than a quarter are left out.
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
    """Scalars for TensorBoard of a :func:`summary`."""
    names = ("mean_abs", "max_abs", "share_large", "rms", "weight_ratio", "grad_rms")
    found = {f"update/{name}": updates["all"][name] for name in names}
    for kind, values in updates["kinds"].items():
        found |= {f"update/{name}/{kind}": values[name] for name in names[:2]}
    return found
