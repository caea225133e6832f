"""Memory of one rank of a job, counted in Megatron's allocations, or by its formulas.

:func:`measure` counts tensors without memory like real ones, so that padding, buckets, shards and
dtypes come from Megatron's code.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Buffer", "Checkpoint", "Rank", "Sizes", "activations", "built", "checkpoint", "measure"]


@dataclass(frozen=True)
class Buffer:
    """One contiguous gradient buffer of Megatron's.

    Attributes:
        elements: number of elements with padding.
        unpadded: number of elements that belong to parameters.
        buckets: number of pieces that are communicated separately.
        param_bytes: bytes of the all-gathered parameters; 0 without the distributed optimizer.
        grad_bytes: bytes of the reduced buffer.
        ranks: size of the group that reduces it.
        largest: elements of its largest bucket, with padding.
    """

    elements: int
    unpadded: int
    buckets: int
    param_bytes: int
    grad_bytes: int
    ranks: int
    largest: int = 0


@dataclass(frozen=True)
class Rank:
    """The memory that one rank keeps from step to step, in bytes.

    Attributes:
        stage: pipeline stage of the rank.
        parameters: elements of its part of the model.
        updated: elements that its optimizer updates (the shard, under the distributed optimizer).
        weights: the model's parameters, including padding.
        gradients: Megatron's gradient buffers, including padding.
        main_parameters: the optimizer's own copies of parameters, or its state's.
        states: the optimizer's states by name; scalars (torch AdamW's ``step``) are left out.
        main_gradients: copies of gradients that live from the step to the next ``zero_grad``.
        buffers: the gradient buffers, one for each dtype and kind.
    """

    stage: int
    parameters: int
    updated: int
    weights: int
    gradients: int
    main_parameters: int
    states: dict[str, int]
    main_gradients: int
    buffers: tuple[Buffer, ...]

    def traffic(self) -> tuple[float, float]:
        """Returns bytes that an optimizer step reads and writes, each tensor once.

        A fused step needs these; a step of several torch operations moves more.
        """
        gradient = self.updated * self._gradient_bytes()
        states = sum(self.states.values())
        weights = self.updated * self.weights / sum(b.elements for b in self.buffers)
        if not self.main_parameters:  # the weights are the main parameters
            return gradient + weights + states, weights + states
        # Remainders are added to the weights.
        halves = weights if self.main_parameters == 2 * self.updated else 0
        # Copies of gradients are written, then read instead of the gradients.
        return (
            gradient + self.main_gradients + self.main_parameters + halves + states,
            self.main_gradients + self.main_parameters + states + weights,
        )

    def norm_traffic(self) -> float:
        """Returns the bytes read to compute the gradient norm, which clipping needs."""
        return self.main_gradients or self.updated * self._gradient_bytes()

    def _gradient_bytes(self) -> float:
        return self.gradients / sum(b.elements for b in self.buffers)

    def reduced_and_gathered(self) -> tuple[float, float]:
        """Returns the bytes that a rank sends in a step over rings, for gradients and parameters.

        Gradients are reduce-scattered with the distributed optimizer, and otherwise all-reduced,
        which sends twice as much.
        """
        reduced = gathered = 0.0
        for b in self.buffers:
            share = (b.ranks - 1) / b.ranks
            reduced += b.grad_bytes * share * (1 if b.param_bytes else 2)
            gathered += b.param_bytes * share
        return reduced, gathered

    @property
    def total(self) -> int:
        """The sum of all."""
        kept = (self.weights, self.gradients, self.main_parameters, self.main_gradients)
        return sum(kept) + sum(self.states.values())


@dataclass(frozen=True)
class Checkpoint:
    """The memory that saving and resuming need on the fullest rank, in bytes.

    Attributes:
        form: the format in torch_dist, ``dp_reshardable`` or ``fully_reshardable``.
        saving: host memory for a save, for the optimizer's part.
        reading: bytes of the optimizer's part that a rank reads to resume.
    """

    form: str
    saving: int
    reading: int


@dataclass(frozen=True)
class Sizes:
    """The memory of the ranks of a job.

    Attributes:
        parameters: elements of the whole model, each once.
        embeddings: those in embeddings and the output layer.
        stages: a rank of each pipeline stage, tensor- and data-parallel rank 0, whose shard has
            no padding at its end. (Gaps that align parameters to 64 elements lie in any shard.)
    """

    parameters: int
    embeddings: int
    stages: tuple[Rank, ...]


def measure(model: Iterable[Any], optimizer: Any, stage: int = 0) -> Rank:
    """Counts the memory of a model in Megatron's DDP and its optimizer, each storage once.

    Args:
        model: the model chunks of this rank.
        optimizer: Megatron's optimizer, with its state allocated.
        stage: the rank's pipeline stage.
    """
    parts = built(optimizer)
    held = [b for chunk in model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    params = [p for chunk in model for p in chunk.parameters()]
    main = [p for part in parts for g in part.optimizer.param_groups for p in g["params"]]
    seen: set[int] = set()
    weights = _bytes((*params, *(b.param_data for b in held)), seen)
    gradients = _bytes((b.grad_data for b in held), seen)
    main_parameters = _bytes(main, seen)
    states: dict[str, int] = {}
    for part in parts:
        for state in part.optimizer.state.values():
            for name, tensor in state.items():
                if isinstance(tensor, torch.Tensor) and tensor.dim():
                    states[name] = states.get(name, 0) + _bytes((tensor,), seen)
    main_parameters += states.pop("master_param", 0)  # under --use-precision-aware-optimizer
    return Rank(
        stage=stage,
        parameters=sum(p.numel() for p in params),
        updated=sum(p.numel() for p in main),
        weights=weights,
        gradients=gradients,
        main_parameters=main_parameters,
        states=states,
        main_gradients=_bytes(
            (g for p in main for g in (p.grad, getattr(p, "decoupled_grad", None))), seen
        ),
        buffers=tuple(
            Buffer(
                elements=b.numel,
                unpadded=sum(p.numel() for p in b.params),
                buckets=len(b.buckets),
                param_bytes=0 if b.param_data is None else b.param_data.nbytes,
                grad_bytes=b.grad_data.nbytes,
                ranks=b.data_parallel_group.size(),
                largest=max(bucket.grad_data.numel() for bucket in b.buckets),
            )
            for b in held
        ),
    )


def built(optimizer: Any) -> list[Any]:
    """Returns the optimizers of a chained one, without those that have no parameters."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]


def _bytes(tensors: Iterable[torch.Tensor | None], seen: set[int]) -> int:
    """Returns the bytes of the tensors' storages that are not in ``seen``, and adds them to it."""
    total = 0
    for tensor in tensors:
        if tensor is not None and tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            total += tensor.untyped_storage().nbytes()
    return total


def checkpoint(args: argparse.Namespace, rank: Rank, form: str | None = None) -> Checkpoint | None:
    """Returns the memory of saving and resuming, as in ``get_parameter_state_dp_zero`` of Megatron.

    Args:
        args: Megatron's validated arguments.
        rank: a rank of the job.
        form: as in :class:`Checkpoint`; that of the arguments if None.

    Returns:
        None if the optimizer is not sharded, or the format is not torch_dist.
    """
    if not args.use_distributed_optimizer or args.ckpt_format != "torch_dist":
        return None
    fully = getattr(args, "dist_ckpt_optim_fully_reshardable", False)
    form = form or ("fully_reshardable" if fully else "dp_reshardable")
    if form == "dp_reshardable":
        # Values: of main parameters in fp32, and of a state in int8 in bf16.
        states = (2 * size if size == rank.updated else size for size in rank.states.values())
        shard = 4 * rank.updated + sum(states)
        return Checkpoint(form, shard, shard)
    # fp32, whatever the dtype of the states is: on each rank whole buffers without padding, and for
    # one bucket the tensor sent, the tensor received, and the tensor assembled from these.
    tensors = 1 + len(rank.states)
    whole = 4 * tensors * sum(b.unpadded for b in rank.buffers)
    bucket = max(4 * b.largest * (2 + tensors / b.ranks) for b in rank.buffers)
    read = whole
    if getattr(args, "ckpt_fully_parallel_load", False):
        read = whole // max(b.ranks for b in rank.buffers)
    return Checkpoint(form, round(whole + bucket), read)


def activations(args: argparse.Namespace) -> tuple[int, str]:
    """Returns activation bytes by Megatron's formula, and its name; (0, reason) without one."""
    from megatron.training import theoretical_memory_usage as formulas

    unknown = {
        "recomputation of whole layers": args.recompute_granularity == "full",
        "context parallelism": args.context_parallel_size > 1,
        "mixtures of experts": bool(args.num_experts),
    }
    if any(unknown.values()):
        return 0, " and ".join(name for name, is_so in unknown.items() if is_so)
    name = "compute_activation_memory_without_sp"
    if args.sequence_parallel and args.recompute_granularity == "selective":
        name = "compute_activation_memory"
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    return int(getattr(formulas, name)(args, num_microbatches=micro_batches)), name
