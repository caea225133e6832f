"""A rank of a job of any size, built by Megatron's own sharding, without the job.

Megatron builds its process groups, model, gradient buffers and optimizer for a rank of a
:mod:`megatron_s3.mcore.planning.fake_world`.
"""

import argparse
import copy
from collections.abc import Iterable
from typing import Any

import torch

from megatron_s3.mcore.arguments.readers import needs_grad_norm
from megatron_s3.mcore.gpt import model_provider
from megatron_s3.mcore.planning import fake_world
from megatron_s3.mcore.planning.memory import Rank, Sizes, built, measure
from megatron_s3.optimizers import OPTIMIZERS

__all__ = ["build", "completed", "needs_norm", "plan"]

#: Arguments whose memory cannot be planned: destination, flag, reason.
_UNSUPPORTED = (
    ("use_megatron_fsdp", "--use-megatron-fsdp", "Megatron-FSDP shards in another way"),
    ("use_torch_fsdp2", "--use-torch-fsdp2", "torch FSDP2 shards in another way"),
    ("fp8", "--fp8-format", "its weights are Transformer Engine's"),
    ("fp4", "--fp4-format", "its weights are Transformer Engine's"),
    ("optimizer_cpu_offload", "--optimizer-cpu-offload", "it keeps states in two memories"),
    (
        "use_layer_wise_distributed_optimizer",
        "--use-distributed-optimizer with Muon",
        "Megatron gives each matrix to one rank as a whole",
    ),
)


def plan(args: argparse.Namespace) -> Sizes:
    """Builds a rank of each pipeline stage of a job, each in a simulated world.

    Afterwards the process can be used for the CPU only (:mod:`megatron_s3.mcore.cpu_device`).

    Args:
        args: Megatron's, validated (:func:`megatron_s3.mcore.planning.parse.parse`) and
            :func:`completed`.

    Raises:
        ValueError: the memory of a flag cannot be planned; the message names it.
        RuntimeError: there is a process group already.
    """
    ranks_apart = args.world_size // args.pipeline_model_parallel_size
    if args.use_tp_pp_dp_mapping:
        ranks_apart = args.tensor_model_parallel_size * args.context_parallel_size
    stages = [
        _rank(args, stage * ranks_apart) for stage in range(args.pipeline_model_parallel_size)
    ]
    if [rank.stage for rank, _, _ in stages] != list(range(len(stages))):
        raise AssertionError("Megatron orders its ranks differently than expected here")
    return Sizes(
        parameters=sum(elements for _, elements, _ in stages),
        embeddings=sum(embedded for _, _, embedded in stages),
        stages=tuple(rank for rank, _, _ in stages),
    )


def completed(args: argparse.Namespace) -> argparse.Namespace:
    """Returns validated arguments with the padded vocabulary, which Megatron sets later.

    Raises:
        ValueError: the size of the vocabulary is not given.
    """
    from megatron.core.tokenizers.utils import build_tokenizer

    args = copy.copy(args)
    if args.padded_vocab_size is None and str(args.tokenizer_type).startswith("Null"):
        build_tokenizer.build_tokenizer(args)
    elif args.padded_vocab_size is None:
        if args.vocab_size is None:
            raise ValueError(
                "--vocab-size is not given, and a plan loads no tokenizer; set the size of the "
                "vocabulary"
            )
        args.padded_vocab_size = build_tokenizer.vocab_size_with_padding(args.vocab_size, args)
    return args


def needs_norm(args: argparse.Namespace) -> bool:
    """Returns whether each step computes the gradient norm; Megatron's own optimizers do."""
    return args.optimizer not in OPTIMIZERS or needs_grad_norm(args)


def _rank(args: argparse.Namespace, rank: int) -> tuple[Rank, int, int]:
    """Returns a rank, and the elements and embedding elements that its stage adds to the model."""
    for name, flag, reason in _UNSUPPORTED:
        if getattr(args, name, False):
            raise ValueError(f"{flag} cannot be planned: {reason}. Leave it out")
    if getattr(args, "num_distributed_optimizer_instances", 1) > 1:
        raise ValueError(
            "--num-distributed-optimizer-instances above 1 cannot be planned: the communication "
            "between instances is not counted. Leave it out"
        )
    if getattr(args, "use_precision_aware_optimizer", False) and args.optimizer not in OPTIMIZERS:
        raise ValueError(
            "--use-precision-aware-optimizer cannot be planned with --optimizer "
            f"{args.optimizer}: its main parameters and states are Transformer Engine's. Leave it "
            "out"
        )
    with fake_world.rank_of(args, rank) as stage:
        model, optimizer = build()
        for part in built(optimizer):
            part.init_state_fn(part.optimizer, part.config)
            # fp32 has no main gradients to copy to; Megatron only sets pointers to the buffers.
            getattr(part, "_copy_model_grads_to_main_grads", part.prepare_grads)()
        return measure(model, optimizer, stage), *_elements(model)


def build() -> tuple[list[torch.nn.Module], Any]:
    """Returns model chunks and optimizer of this rank, as Megatron's trainer sets them up."""
    from megatron.core.enums import ModelType
    from megatron.training import training
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.global_vars import get_args

    args = get_args()
    of_model = core_transformer_config_from_args(args)

    def provider(*args: Any, **kwargs: Any) -> torch.nn.Module:
        return model_provider(*args, **{**kwargs, "config": of_model})

    model = training.get_model(provider, ModelType.encoder_or_decoder)
    made = training.get_megatron_optimizer_config(args)
    config, overrides = made if isinstance(made, tuple) else (made, None)
    config.plugin_log_updates = False  # a few kilobytes, and collectives without other members
    more = {"config_overrides": overrides} if isinstance(made, tuple) else {}
    optimizer = training.get_megatron_optimizer(
        config, model, use_gloo_process_groups=args.use_gloo_process_groups, **more
    )
    return model, optimizer


def _elements(model: Iterable[torch.nn.Module]) -> tuple[int, int]:
    """Returns the elements that this stage adds to the whole model, and those of embeddings."""
    from megatron.core import parallel_state

    whole = embedded = 0
    for chunk in model:
        for name, param in chunk.named_parameters():
            if getattr(param, "shared", False):  # the last stage's copy of a tied embedding
                continue
            expert = not getattr(param, "allreduce", True)
            elements = param.numel()
            if expert:
                elements *= parallel_state.get_expert_model_parallel_world_size()
            if getattr(param, "tensor_model_parallel", False):
                elements *= (
                    parallel_state.get_expert_tensor_parallel_world_size()
                    if expert
                    else parallel_state.get_tensor_model_parallel_world_size()
                )
            whole += elements
            if "embedding." in name or "output_layer." in name:
                embedded += elements
    return whole, embedded
