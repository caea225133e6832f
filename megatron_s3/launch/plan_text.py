"""A plan as text and as JSON."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from megatron_s3.launch.planning import SAVING, Plan

if TYPE_CHECKING:
    from megatron_s3.mcore.planning.memory import Rank

__all__ = ["as_json", "text"]


def text(plan: Plan) -> str:
    """Returns the plan as text; bytes are in powers of ten."""
    rank, sizes = plan.fullest, plan.sizes
    used = " x ".join(f"{kind} {n:,}" for kind, n in plan.layout.items() if kind != "expert")
    if plan.layout["expert"] > 1:
        used += f", expert {plan.layout['expert']}"
    how = "sharded over" if plan.sharded else "complete on all"
    padding = sum(b.elements - b.unpadded for b in rank.buffers)
    buckets = sum(b.buckets for b in rank.buffers)
    reduced, gathered = rank.reduced_and_gathered()
    read, written = rank.traffic()
    reduction = "reduce-scatter" if plan.sharded else "all-reduce"
    tokens = plan.batch * plan.sequence
    rows: list[tuple[str, str, str] | None] = [
        (f"{plan.name} on {plan.gpus:,} GPUs", "", ""),
        ("layout", used, f"{plan.optimizer}, its state {how} data-parallel ranks"),
        ("parameters", f"{sizes.parameters:,}", ""),
        (
            "  without embeddings",
            f"{sizes.parameters - sizes.embeddings:,}",
            f"vocabulary padded to {plan.vocabulary:,}, from {plan.vocabulary_source}",
        ),
        ("", "", ""),
        (_title(plan), "", ""),
        ("  parameters", f"{rank.parameters:,}", f"{rank.updated:,} updated by its optimizer"),
        ("  weights", _bytes(rank.weights), ""),
        (
            "  gradients",
            _bytes(rank.gradients),
            f"{padding:,} elements of padding; communicated in {buckets} "
            + ("bucket" if buckets == 1 else "buckets"),
        ),
        ("  main parameters", _bytes(rank.main_parameters), ""),
        *((f"  state {name}", _bytes(size), "") for name, size in rank.states.items()),
        ("  main gradients", _bytes(rank.main_gradients), "") if rank.main_gradients else None,
        ("  total", _bytes(rank.total), f"{rank.total:,} bytes"),
        *_other_stages(plan),
        ("  not counted", *_activations(plan)),
        ("", "", "workspaces, fragmentation, NCCL's buffers"),
        ("", "", ""),
        ("in each step, on this rank", "", ""),
        (
            "  optimizer reads",
            _bytes(read),
            "gradients, main parameters, state: each once, as a fused step",
        ),
        ("  optimizer writes", _bytes(written), "main parameters, state, weights"),
        (
            "  gradient norm reads",
            _bytes(rank.norm_traffic()),
            "in each step" if plan.norm else "only with --clip-grad; off here",
        ),
        (f"  {reduction} sends", _bytes(reduced), f"gradients, in a ring of {_ring(rank)} ranks"),
        ("  all-gather sends", _bytes(gathered), "updated weights") if plan.sharded else None,
        (
            "  link",
            f"{(reduced + gathered) / plan.step_seconds / 1e9:,.1f} GB/s",
            "to send it within the step time below; traffic of other parallelism is not counted",
        ),
        *_checkpoint(plan),
        ("", "", ""),
        ("FLOPs of a step", f"{plan.flops:.4g}", "all ranks, as Megatron counts them"),
        ("tokens of a step", f"{tokens:,}", f"{plan.batch:,} sequences of {plan.sequence:,}"),
        ("steps", f"{plan.steps:,}", ""),
        ("tokens", f"{tokens * plan.steps:.4g}", ""),
        (
            "a step",
            f"{plan.step_seconds:.3g} s",
            f"at --mfu {plan.mfu:g} of --peak-tflops {plan.peak / 1e12:g} (H100, bf16, dense: 989)",
        ),
        (
            "all steps",
            f"{plan.days:.3g} days",
            f"{plan.days * 24:.3g} hours, without evaluations, checkpoints and failures",
        ),
        (
            "from signal to saved",
            f"{plan.notice:,.0f} s",
            f"a step, an evaluation, and {_bytes(plan.checkpoint)} at {_bytes(SAVING)}/s",
        ),
        *_too_late(plan),
    ]
    return "\n".join(
        f"{label:<24}{value:>18}  {note}".rstrip() if value or note else label
        for label, value, note in filter(None, rows)
    )


def _too_late(plan: Plan) -> list[tuple[str, str, str]]:
    if plan.notice <= plan.signal:
        return []
    minutes = math.ceil(plan.notice / 60)
    return [
        (
            "  WARNING",
            f"{plan.signal:,} s",
            "is the time from the signal to the time limit; use --set "
            f"launch.sbatch.signal=B:USR1@{minutes * 60}",
        )
    ]


def _title(plan: Plan) -> str:
    stages = len(plan.sizes.stages)
    which = f"of pipeline stage {plan.fullest.stage} of 0-{stages - 1}, the fullest"
    return f"a rank {which}" if stages > 1 else "a rank"


def _other_stages(plan: Plan) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for rank in plan.sizes.stages:
        if rank is not plan.fullest and (not rows or rows[-1][1] != _bytes(rank.total)):
            rows.append((f"  total, stage {rank.stage}", _bytes(rank.total), ""))
        elif rank is not plan.fullest:
            first = rows[-1][0].split("-")[0]
            rows[-1] = (f"{first}-{rank.stage}", rows[-1][1], "")
    return rows


def _checkpoint(plan: Plan) -> list[tuple[str, str, str]]:
    """Returns the lines about saving and resuming."""
    now, other = plan.saved, plan.otherwise
    if now is None or other is None:
        return []
    flag = "--dist-ckpt-optim-fully-reshardable"
    if now.form == "fully_reshardable":
        switch = (
            f"without {flag} {_bytes(other.saving)}, read {_bytes(other.reading)}; sufficient if "
            "tensor and pipeline parallelism do not change"
        )
    else:
        switch = (
            "cannot be resumed with another tensor or pipeline parallelism; to change it, save "
            f"once with {flag}: {_bytes(other.saving)} in each rank"
        )
    return [
        ("", "", ""),
        ("checkpoints", now.form, switch),
        (
            "  a save takes",
            _bytes(now.saving),
            "of host memory in each rank, for the optimizer's part",
        ),
        (
            "  a resume reads",
            _bytes(now.reading),
            f"in each rank, for the optimizer's part; {_bytes(now.reading * plan.gpus)} in all",
        ),
    ]


def _activations(plan: Plan) -> tuple[str, str]:
    if not plan.activations:
        return "", f"activations (Megatron's formula does not cover {plan.formula})"
    return _bytes(plan.activations), f"activations: an estimate by Megatron's {plan.formula}"


def _ring(rank: "Rank") -> str:
    return " and ".join(f"{n:,}" for n in sorted({b.ranks for b in rank.buffers}, reverse=True))


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.3f} {unit}"
    return f"{count:,.0f} B"


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns everything in the plan, bytes and elements as whole numbers."""
    fullest = plan.fullest
    read, written = fullest.traffic()
    reduced, gathered = fullest.reduced_and_gathered()
    return dataclasses.asdict(plan) | {
        "fullest_stage": fullest.stage,
        "bytes_a_rank": fullest.total,
        "optimizer_reads": round(read),
        "optimizer_writes": round(written),
        "gradient_norm_reads": round(fullest.norm_traffic()),
        "gradient_reduction_sends": round(reduced),
        "weight_gathering_sends": round(gathered),
        "tokens": plan.batch * plan.sequence * plan.steps,
        "step_seconds": plan.step_seconds,
        "days": plan.days,
        "checkpoint_bytes": round(plan.checkpoint),
        "notice_seconds": plan.notice,
    }
