"""GPT pretraining on the wheel of megatron-core >= 0.17 alone, without a Megatron-LM checkout.

Run it as ``torchrun [...] -m megatron_s3.pretrain_gpt ARGS``; the arguments are Megatron-LM's. The
wheel contains the trainer and the models, and this module is the script that connects them. It
supports dense and mixture-of-experts GPT on plain documents and rejects arguments of other models:
for those, run Megatron-LM's own script with ``-m megatron_s3 pretrain_gpt.py``.

Megatron is imported inside the functions, because ``register`` must be called first.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_s3.mcore import compat_before_0_18
from megatron_s3.mcore.gpt import model_provider
from megatron_s3.mcore.refusal import in_one_line


def forward_step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[Any, ...]:
    """Runs a micro-batch through this rank's part of the model.

    Args:
        data_iterator: yields dicts of ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``,
            each (batch, sequence), and perhaps ``attention_mask``; only the first and the last
            stage of the pipeline read it.
        model: the model of ``model_provider``, wrapped by Megatron.

    Returns:
        The output, which is losses (batch, sequence) on the last stage, and the function that
        reduces it.
    """
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training.utils import is_first_or_last_pipeline_stage

    batch = {}
    if is_first_or_last_pipeline_stage(get_attr_wrapped_model(model, "vp_stage")):
        batch = {
            name: value.cuda(non_blocking=True)
            for name, value in next(data_iterator).items()
            if isinstance(value, torch.Tensor)
        }
        batch = {name: _on_this_context_rank(name, value) for name, value in batch.items()}
    loss_mask = batch.get("loss_mask")
    output = model(
        batch.get("tokens"),
        batch.get("position_ids"),
        batch.get("attention_mask"),
        labels=batch.get("labels"),
        loss_mask=loss_mask,
    )
    return output, partial(_loss, loss_mask)


def _on_this_context_rank(name: str, value: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of each sequence under context parallelism.

    A sequence is cut into 2 x ranks parts; rank 0 gets the first and the last, and so on, so that
    causal attention costs every rank the same. The function ``get_batch_on_this_cp_rank`` of
    megatron.core.utils does this too, but its arguments differ between releases.
    """
    from megatron.core import parallel_state

    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return value
    dim = 2 if name == "attention_mask" else 1
    parts = value.chunk(2 * ranks, dim)
    rank = parallel_state.get_context_parallel_rank()
    return torch.cat([parts[rank], parts[-1 - rank]], dim)


def _loss(loss_mask: torch.Tensor | None, losses: torch.Tensor) -> tuple[Any, ...]:
    """Returns the summed loss, its number of tokens, and both for Megatron's log."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    assert loss_mask is not None  # only the last stage calls this, and it has read the batch
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    args = get_args()
    rerun = get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [("NaN", torch.isnan, True), ("Inf", torch.isinf, True)]
    if args.check_for_spiky_loss:
        spiky = partial(rerun.is_unexpectedly_large, threshold=10, context="loss")
        checks.append(("a spike", spiky, False))
    for what, rejects, fatal in checks:
        rerun.validate_result(
            result=loss,
            rejection_func=rejects,
            message=f"found {what} in the local loss of the forward pass",
            tolerance=0.0,
            fatal=fatal,
        )
    logged = torch.cat([loss.detach().view(1), tokens.view(1)])
    return loss, tokens, {"lm loss": logged}


def train_valid_test_datasets_provider(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple[Any, ...]:
    """Builds the three datasets on the ranks that read them.

    Every rank of a tensor-parallel group reads the data, so that no batch needs a broadcast.

    Args:
        num_samples: number of samples for training, validation and test.
        vp_stage: the virtual pipeline stage, if there is one.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.utils import (
        get_blend_and_blend_per_split,
        is_first_or_last_pipeline_stage,
    )

    args = get_args()
    sequences = args.per_dataset_sequences_path
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=json.loads(Path(sequences).read_text()) if sequences else None,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    is_built = partial(is_first_or_last_pipeline_stage, vp_stage)
    builder = BlendedMegatronDatasetBuilder(kind, num_samples, is_built, config)
    built: tuple[Any, ...] = builder.build()
    return built


# Megatron then builds the data loaders on every rank instead of on the first of each group.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


@in_one_line()
def main() -> None:
    """Trains with the arguments in ``sys.argv`` and the optimizers that are registered.

    Raises:
        SystemExit: the arguments are rejected; rank 0 has printed the reason.
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    trainer = partial(
        pretrain,
        train_valid_test_dataset_provider=train_valid_test_datasets_provider,
        model_provider=model_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
    )
    defaults = {"tokenizer_type": "GPT2BPETokenizer"}
    if compat_before_0_18.takes_defaults(pretrain):
        trainer(args_defaults=defaults)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults=defaults)
    trainer(pretrain_cfg_container_from_args(args))


if __name__ == "__main__":
    from megatron_s3 import register
    from megatron_s3.launch import lock
    from megatron_s3.mcore.registration import asked_device

    lock.join()
    register(asked_device() or "auto")
    main()
