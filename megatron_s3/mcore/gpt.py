"""The GPT that :mod:`megatron_s3.pretrain_gpt` trains: dense or mixture-of-experts.

Megatron is imported inside the functions, because ``register`` must come first.
"""

import argparse
from typing import Any

import torch

from megatron_s3.mcore.refusal import Refused

__all__ = ["model_provider", "refuse_other_models"]

# Destinations of arguments that Megatron-LM's own script supports and this one does not.
_NOT_HERE = (
    "dataloader_inter_document_masking",
    "experimental_attention_variant",
    "fim_data",
    "heterogeneous_layers_config_path",
    "hybrid_context_parallel",
    "inprocess_restart",
    "logits_load_dir",
    "mtp_num_layers",
    "overlap_moe_expert_parallel_comm",
    "sft",
    "spec",
    "use_legacy_models",
    "yaml_cfg",
)


def refuse_other_models(args: argparse.Namespace) -> None:
    """Rejects arguments that only Megatron-LM's own script supports.

    Raises:
        Refused: the message names them.
    """
    refused = [name for name in _NOT_HERE if getattr(args, name, None)]
    if refused:
        raise Refused(
            f"megatron_s3.pretrain_gpt does not support {', '.join(refused)}; run Megatron-LM's "
            "own pretrain_gpt.py with -m megatron_s3"
        )


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> torch.nn.Module:
    """Builds this rank's part of the model.

    Args:
        pre_process: whether the part begins with the embedding.
        post_process: whether it ends with the output layer and the loss.
        vp_stage: the virtual pipeline stage, if there are any.
        config: a ``TransformerConfig``; made from the arguments if None.
        pg_collection: the process groups; the global ones if None.

    Raises:
        Refused: as :func:`refuse_other_models`.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    refuse_other_models(args)
    config = config or core_transformer_config_from_args(args)
    model: torch.nn.Module = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=args.transformer_impl == "transformer_engine",
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    return model
