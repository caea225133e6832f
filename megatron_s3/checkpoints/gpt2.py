"""Megatron's GPT as Hugging Face's GPT-2: supported models, configuration and names."""

import argparse
import re
from collections.abc import Mapping
from typing import Any

import torch

from megatron_s3.errors import MegatronS3Error

__all__ = ["NotGPT2", "check", "config", "state_dict"]


class NotGPT2(MegatronS3Error, ValueError):
    """Raised for a model that GPT2LMHeadModel cannot compute; the message names the difference."""


# Megatron's arguments of a GPT-2; an argument that a release does not have has this value there.
_GPT2 = {
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "heterogeneous_layers_config_path": None,
    "is_hybrid_model": False,
    "layernorm_zero_centered_gamma": False,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "num_experts": None,
    "qk_l2_norm": False,
    "qk_layernorm": False,
    "quick_geglu": False,
    "softmax_type": "vanilla",
    "spec": None,
    "squared_relu": False,
    "swiglu": False,
    "use_mup": False,
    "use_te_activation_func": False,
    "window_size": None,
}

_EMBEDDINGS = {
    "embedding.word_embeddings.weight": "transformer.wte.weight",
    "embedding.position_embeddings.weight": "transformer.wpe.weight",
    "decoder.final_layernorm.weight": "transformer.ln_f.weight",
    "decoder.final_layernorm.bias": "transformer.ln_f.bias",
    "output_layer.weight": "lm_head.weight",
}
# With Transformer Engine a norm is part of the linear layer that follows it.  Megatron's other
# layers are saved under those names too, except for a separate norm.
_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "ln_1.weight",
    "self_attention.linear_qkv.layer_norm_bias": "ln_1.bias",
    "input_layernorm.weight": "ln_1.weight",
    "input_layernorm.bias": "ln_1.bias",
    "self_attention.linear_qkv.weight": "attn.c_attn.weight",
    "self_attention.linear_qkv.bias": "attn.c_attn.bias",
    "self_attention.linear_proj.weight": "attn.c_proj.weight",
    "self_attention.linear_proj.bias": "attn.c_proj.bias",
    "mlp.linear_fc1.layer_norm_weight": "ln_2.weight",
    "mlp.linear_fc1.layer_norm_bias": "ln_2.bias",
    "pre_mlp_layernorm.weight": "ln_2.weight",
    "pre_mlp_layernorm.bias": "ln_2.bias",
    "mlp.linear_fc1.weight": "mlp.c_fc.weight",
    "mlp.linear_fc1.bias": "mlp.c_fc.bias",
    "mlp.linear_fc2.weight": "mlp.c_proj.weight",
    "mlp.linear_fc2.bias": "mlp.c_proj.bias",
}
_LAYERS = "decoder.layers."


def check(args: argparse.Namespace) -> None:
    """Checks that the model is a GPT-2.

    Args:
        args: Megatron's arguments of the run.

    Raises:
        NotGPT2: it is not; the message names every argument that differs.
    """
    found = [
        _flag(name, value)
        for name, gpt2s in _GPT2.items()
        if (value := getattr(args, name, gpt2s)) != gpt2s and (value or gpt2s)
    ]
    groups = getattr(args, "num_query_groups", None)
    if getattr(args, "group_query_attention", False) and groups != args.num_attention_heads:
        found.append(f"--num-query-groups {groups}")
    if args.kv_channels * args.num_attention_heads != args.hidden_size:
        found.append(f"--kv-channels {args.kv_channels}")
    if found:
        raise NotGPT2(
            f"the model is not a GPT-2, because of {', '.join(found)}: Hugging Face's "
            "GPT2LMHeadModel has learned positions, LayerNorm, biases, one key and value for each "
            "head and gelu, and nothing else. Nothing was written. Export a model trained without "
            "these, or convert it to another architecture with NVIDIA's Megatron Bridge."
        )


def _flag(name: str, value: object) -> str:
    words = name.replace("_", "-")
    if value is False:
        return f"--disable-{words.removeprefix('add-')}"
    return f"--{words}" if value is True else f"--{words} {value}"


def config(args: argparse.Namespace, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the values of ``transformers.GPT2Config``.

    Args:
        args: Megatron's arguments, which :func:`check` has accepted.
        vocab_size: the number of tokens without padding.
        dtype: the dtype of the written weights.
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab_size,
        "n_positions": args.max_position_embeddings,
        "n_embd": args.hidden_size,
        "n_layer": args.num_layers,
        "n_head": args.num_attention_heads,
        "n_inner": args.ffn_hidden_size,
        # Megatron's fused bias and gelu is the tanh approximation; unfused it is the exact one.
        "activation_function": "gelu_new" if args.bias_gelu_fusion else "gelu",
        "resid_pdrop": args.hidden_dropout,
        "embd_pdrop": args.hidden_dropout,
        "attn_pdrop": args.attention_dropout,
        "layer_norm_epsilon": args.layernorm_epsilon,
        "initializer_range": args.init_method_std,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "dtype": str(dtype).removeprefix("torch."),
    }


def state_dict(
    args: argparse.Namespace, tensors: Mapping[str, torch.Tensor], vocab_size: int
) -> dict[str, torch.Tensor]:
    """Returns the tensors with Hugging Face's names and layout.

    Args:
        args: Megatron's arguments.
        tensors: the complete tensors by Megatron's names; layers are stacked or numbered.
        vocab_size: rows of the embedding and the output layer to keep.

    Raises:
        NotGPT2: a tensor does not belong to a GPT-2, or one of a GPT-2 is missing.
    """
    found: dict[str, torch.Tensor] = {}
    nowhere = []
    for name, tensor in tensors.items():
        numbered = re.fullmatch(re.escape(_LAYERS) + r"(\d+)\.(.+)", name)
        inside = numbered[2] if numbered else name.removeprefix(_LAYERS)
        if name in _EMBEDDINGS:
            of_words = name in ("embedding.word_embeddings.weight", "output_layer.weight")
            found[_EMBEDDINGS[name]] = tensor[:vocab_size] if of_words else tensor
        elif name.startswith(_LAYERS) and inside in _LAYER:
            layers = [(int(numbered[1]), tensor)] if numbered else list(enumerate(tensor))
            for index, part in layers:
                found[f"transformer.h.{index}.{_LAYER[inside]}"] = _converted(args, inside, part)
        else:
            nowhere.append(name)
    tops = set(_EMBEDDINGS.values())
    if not args.untie_embeddings_and_output_weights:
        tops.discard("lm_head.weight")
        found.pop("lm_head.weight", None)  # a copy, which the last pipeline stage holds
    every = range(args.num_layers)
    expected = tops | {f"transformer.h.{i}.{name}" for i in every for name in _LAYER.values()}
    if nowhere or found.keys() != expected:
        said = {
            "holds": nowhere + sorted(found.keys() - expected),
            "lacks": sorted(expected - found.keys()),
        }
        parts = [f"{verb} {', '.join(names[:6])}" for verb, names in said.items() if names]
        raise NotGPT2(
            f"the model is not a GPT-2: the checkpoint {' and '.join(parts)}. Nothing was written. "
            "Export a model that Megatron trained as a GPT with learned positions, LayerNorm, "
            "biases and gelu."
        )
    # Each tensor has memory of its own: the file format does not store views.
    return {k: v.clone(memory_format=torch.contiguous_format) for k, v in found.items()}


def _converted(args: argparse.Namespace, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a layer's tensor: weights as (in, out), all queries before all keys and values."""
    if "linear_qkv.weight" in name or "linear_qkv.bias" in name:
        # Megatron's rows: for each head its query, key and value.
        heads = tensor.reshape(args.num_attention_heads, 3, args.kv_channels, *tensor.shape[1:])
        tensor = heads.transpose(0, 1).flatten(0, 2)
    return tensor.T if tensor.ndim == 2 else tensor
