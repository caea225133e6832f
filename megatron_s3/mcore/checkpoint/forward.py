"""Runs Megatron's own forward pass on a checkpoint, in fp32 on the CPU.

This runs in a separate process, because Megatron on the CPU replaces torch's ``cuda`` names
permanently.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from megatron_s3.mcore.checkpoint.read import CheckpointError, common

__all__ = ["logits"]

#: Arguments of a checkpoint that determine where and how fast it ran, and not the result, are reset
#: to Megatron's default, like all of ModelParallelConfig.
_HOW_IT_RAN = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "batch_invariant_mode",
    "cuda_graph_impl",
    "cuda_graph_scope",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "deterministic_mode",
    "distribute_saved_activations",
    "enable_cuda_graph",
    "external_cuda_graph",
    "fine_grained_activation_offloading",
    "fp4",
    "fp8",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
    "recompute_granularity",
    "recompute_method",
    "recompute_modules",
    "recompute_num_layers",
    "symmetric_ar_type",
    "tp_comm_overlap",
    "use_flash_attn",
    "use_kitchen",
    "use_transformer_engine_op_fuser",
)

#: Arguments that one process without GPU kernels needs.
_HERE = {
    "apply_rope_fusion": False,
    "bf16": False,
    "fp16": False,
    "gradient_accumulation_fusion": False,
    "init_model_with_meta_device": False,
    "masked_softmax_fusion": False,
    "no_persist_layer_norm": True,
    "params_dtype": torch.float32,
    "perform_initialization": False,
    "transformer_impl": "local",
}


def logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the logits of Megatron's own GPTModel, with layers that need no GPU.

    Args:
        checkpoint: what :func:`find` returns.
        tokens: (batch, sequence) integers.

    Returns:
        (batch, sequence, padded vocabulary).

    Raises:
        CheckpointError: Megatron failed; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, result = Path(scratch, "tokens.pt"), Path(scratch, "logits.pt")
        torch.save(tokens, given)
        child = subprocess.run(
            [sys.executable, "-m", __name__, checkpoint.absolute(), given, result],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            | {"LOCAL_WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": ""}
            | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        if child.returncode:
            raise CheckpointError(
                f"{checkpoint}: Megatron's own forward pass on the CPU failed, so the export "
                f"cannot be compared with it. The end of its output:\n{child.stdout[-2000:]}"
            )
        found: torch.Tensor = torch.load(result, weights_only=True)
        return found


def _megatron(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Computes :func:`logits` in this process."""
    from megatron_s3.mcore import cpu_device

    cpu_device.use_cpu()
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training.global_vars import set_args

    from megatron_s3.mcore.gpt import model_provider

    # torch exports it, but not in __all__.
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    held = common(checkpoint)
    set_args(_one_process(held["args"]))
    model: Any = model_provider().float().eval()
    # The states of FP8 scaling, which are empty in other models.
    wanted = {
        name: value
        for name, value in model.sharded_state_dict(metadata=held.get("content_metadata")).items()
        if not name.endswith("_extra_state")
    }
    loaded = dist_checkpointing.load(wanted, str(checkpoint))
    state = {name: value for name, value in loaded.items() if name in wanted}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise CheckpointError(f"{checkpoint}: missing {missing}, unexpected {unexpected}")
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    masked = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        found: torch.Tensor = model(tokens, positions, masked)
    return found


def _one_process(saved: argparse.Namespace) -> argparse.Namespace:
    """Returns the checkpoint's arguments, for one process on the CPU in fp32."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.enums import AttnBackend
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    defaults = vars(add_megatron_arguments(parser).parse_args([]))
    reset = {*_HOW_IT_RAN, *(field.name for field in fields(ModelParallelConfig))}
    values = defaults | {k: v for k, v in vars(saved).items() if k not in reset}
    values |= _HERE | {"attention_backend": AttnBackend.local}
    for name in reset - values.keys():  # derived by the validation; the parser does not know it
        values[name] = getattr(ModelParallelConfig, name, None)
    return argparse.Namespace(**values)


if __name__ == "__main__":
    torch.save(
        _megatron(Path(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)), sys.argv[3]
    )
