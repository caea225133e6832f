"""Tests that each of Megatron's arguments has its effect in the script of the wheel."""

import argparse
import json

import pytest

from tests.harness.releases import RELEASES
from tests.mcore.library import globally, on_ranks


def parsed(*words):
    from megatron.training.arguments import add_megatron_arguments

    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args(list(words))
    args.padded_vocab_size = 128
    return args


@pytest.mark.parametrize("release", RELEASES)
@on_ranks(1)
def test_settings_of_the_data_reach_the_datasets(release, tmp_path):
    from megatron.core.datasets import blended_megatron_dataset_builder as builders
    from megatron.core.tokenizers.utils import build_tokenizer as tokenizers

    from megatron_s3 import pretrain_gpt

    class Builder:
        def __init__(self, kind, num_samples, is_built, config):
            self.config = config

        def build(self):
            return (self.config,)

    sequences = tmp_path / "sequences.json"
    sequences.write_text(json.dumps({"one": 3}))
    args = parsed(
        *("--mock-data", "--seq-length", "8", "--split", "1,1,1", "--seed", "7"),
        *("--allow-ambiguous-pad-tokens", "--data-cache-path", str(tmp_path)),
        *("--dataloader-fast-cache-load", "--dataloader-defer-npy-index-mmap"),
        *("--per-dataset-sequences-path", str(sequences)),
    )
    with pytest.MonkeyPatch.context() as patch, globally(args):
        patch.setattr(builders, "BlendedMegatronDatasetBuilder", Builder)
        patch.setattr(
            tokenizers, "build_tokenizer", lambda args: argparse.Namespace(vocab_size=100)
        )
        (config,) = pretrain_gpt.train_valid_test_datasets_provider([4, 2, 1])
    assert config.random_seed == 7 and config.sequence_length == 8
    assert config.allow_ambiguous_pad_tokens
    assert config.fast_cache_load and config.defer_npy_index_mmap
    assert config.sequences_per_dataset == {"one": 3}


@on_ranks(1)
def test_settings_of_the_positions_reach_the_model():
    from megatron.core.models import gpt
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_s3.mcore.gpt import model_provider

    words = ["--position-embedding-type", "rope", "--use-rope-scaling", "--rotary-base", "50"]
    words += ["--rope-scaling-factor", "32", "--rotary-seq-len-interpolation-factor", "2"]
    with pytest.MonkeyPatch.context() as patch, globally(parsed(*words)):
        patch.setattr(gpt, "GPTModel", lambda **settings: settings)
        patch.setattr(gpt_layer_specs, "get_gpt_decoder_block_spec", lambda *given, **more: None)
        settings = model_provider(config=argparse.Namespace())
    assert settings["rope_scaling"] and settings["rope_scaling_factor"] == 32
    assert settings["rotary_base"] == 50 and settings["seq_len_interpolation_factor"] == 2
