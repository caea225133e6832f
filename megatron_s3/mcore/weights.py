"""Reads the model out of a checkpoint, and runs Megatron's own forward on it.

``arguments`` and ``tensors`` read the ``torch_dist`` format, which holds whole tensors whatever the
layout was that saved them.  ``logits`` loads the same checkpoint on Megatron's own path, in a
process of its own: on the CPU, where Megatron needs torch's ``cuda`` names replaced for good.

Reading unpickles what the checkpoint holds, as Megatron does: read only what you trust.
"""

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import torch

from megatron_s3.mcore import integrity

__all__ = ["CheckpointError", "arguments", "find", "logits", "number", "tensors", "threads"]

#: Whatever of a checkpoint's arguments says where and how fast it ran, and not what it computes, is
#: set back to Megatron's default; so is all of ModelParallelConfig.
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

#: And these are what one process without GPU kernels needs.
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


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the folder, the reason and what to do."""


def find(folder: str | Path, iteration: int | None = None) -> Path:
    """The folder of one iteration, ``iter_XXXXXXX``, or of a release, ``release``.

    Args:
        folder: what ``--save`` named, or a folder of one iteration in it.
        iteration: which; the last one saved if None.

    Raises:
        CheckpointError: there is none, it is not complete or damaged,
            or not in the format ``torch_dist``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the one of the run's --save")
    tracker = folder / "latest_checkpointed_iteration.txt"
    latest = tracker.read_text().strip() if tracker.is_file() else ""
    if re.fullmatch(r"iter_\d+|release", folder.name) and not latest:
        if iteration not in (None, number(folder)):
            raise CheckpointError(
                f"{folder} is another iteration than --iteration {iteration}: leave the flag out, "
                f"or give {folder.parent}"
            )
        found = folder
    elif iteration is None and latest == "release":
        found = folder / "release"
        if not found.is_dir():
            raise CheckpointError(f"{tracker} names a release, and there is no {found}")
    else:
        saved = sorted(path.name for path in folder.glob("iter_*"))
        there = f"there are: {', '.join(saved)}" if saved else "it holds no iter_XXXXXXX"
        if iteration is None:
            if not latest.isdecimal():
                raise CheckpointError(
                    f"{folder}: {tracker.name} names no iteration, so no save has finished; "
                    f"{there}. Choose one with --iteration, or give another folder."
                )
            iteration = int(latest)
        found = folder / f"iter_{iteration:07d}"
        if not found.is_dir():
            raise CheckpointError(f"{folder}: no iteration {iteration}; {there}")
    if list(found.glob("mp_rank_*")):
        raise CheckpointError(
            f"{found} is in the format --ckpt-format torch, which only the layout that saved it "
            "reads. Run its training command once more, in that layout, with "
            f"--load {found.parent} --ckpt-convert-format torch_dist --ckpt-convert-save FOLDER, "
            "and give FOLDER/torch_dist."
        )
    if not (found / "metadata.json").is_file() or not list(found.glob("*.distcp")):
        raise CheckpointError(
            f"{found} is not a complete checkpoint of the format --ckpt-format torch_dist "
            "(metadata.json and *.distcp): choose another iteration, or save in that format"
        )
    _check_files(found)
    return found


def number(checkpoint: Path) -> int | None:
    """The iteration of a folder that :func:`find` returns; None of a release."""
    return int(checkpoint.name[5:]) if checkpoint.name != "release" else None


def threads() -> int:
    """How many read and write a checkpoint's files: one for each processor, 8 at most."""
    return min(8, len(os.sched_getaffinity(0)))


def _check_files(checkpoint: Path) -> None:
    """Every file of the checkpoint is there, whole, and what was written."""
    try:
        integrity.check(checkpoint)
        verify = functools.partial(integrity.verify, checkpoint, of=threads())
        with ThreadPoolExecutor(threads()) as pool:
            list(pool.map(verify, range(threads())))
    except integrity.Damaged as error:
        raise CheckpointError(
            f"{error}: the checkpoint is damaged. Choose another iteration with --iteration."
        ) from error


def arguments(checkpoint: Path) -> argparse.Namespace:
    """Megatron's arguments of the run that saved it.

    Args:
        checkpoint: what :func:`find` returns.

    Raises:
        CheckpointError: it holds none, or another release than the installed one is needed.
    """
    return _common(checkpoint)["args"]


def _common(checkpoint: Path) -> dict:
    from megatron.core import dist_checkpointing

    try:
        common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint}: the installed megatron-core cannot read its arguments "
            f"({type(error).__name__}: {error}). Use the release that saved it."
        ) from error
    if "args" not in common:
        raise CheckpointError(
            f"{checkpoint}: it holds no arguments of the run, so nothing tells what the model is. "
            "Give a checkpoint that Megatron's trainer saved."
        )
    return common


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors, whole, by their names in the checkpoint; not the optimizer's.

    Layers are stacked, (layers, ...), under ``decoder.layers.``, or numbered there where Megatron
    saved them one by one.

    Args:
        checkpoint: what :func:`find` returns.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(checkpoint)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not re.match(r"(chained_\d+\.)?opt", name)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What Megatron's own GPTModel computes, with the layers that need no GPU, in fp32 on the CPU.

    Args:
        checkpoint: what :func:`find` returns.
        tokens: (batch, sequence) integers.

    Returns:
        (batch, sequence, padded vocabulary).

    Raises:
        CheckpointError: Megatron could not; with the end of what it said.
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
                f"{checkpoint}: Megatron's own forward on the CPU failed, so that nothing can be "
                f"compared with it. The end of what it said:\n{child.stdout[-2000:]}"
            )
        return torch.load(result, weights_only=True)


def _megatron(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """:func:`logits`, in this process."""
    from megatron_s3.mcore import cpu_device

    cpu_device.use_cpu()
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training.global_vars import set_args

    from megatron_s3.pretrain_gpt import model_provider

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    common = _common(checkpoint)
    set_args(_one_process(common["args"]))
    model = model_provider().float().eval()
    # The states of FP8 scaling, which are empty in what is no FP8 model.
    wanted = {
        name: value
        for name, value in model.sharded_state_dict(metadata=common.get("content_metadata")).items()
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
        return model(tokens, positions, masked)


def _one_process(saved: argparse.Namespace) -> argparse.Namespace:
    """The checkpoint's arguments, for one process on the CPU in fp32."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.enums import AttnBackend
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    defaults = vars(add_megatron_arguments(parser).parse_args([]))
    reset = {*_HOW_IT_RAN, *(field.name for field in fields(ModelParallelConfig))}
    values = defaults | {k: v for k, v in vars(saved).items() if k not in reset}
    values |= _HERE | {"attention_backend": AttnBackend.local}
    for name in reset - values.keys():  # which validation derives, and the parser does not know
        values[name] = getattr(ModelParallelConfig, name, None)
    return argparse.Namespace(**values)


if __name__ == "__main__":
    torch.save(
        _megatron(Path(sys.argv[1]), torch.load(sys.argv[2], weights_only=True)), sys.argv[3]
    )
