"""A training by Megatron-Bridge's own ``pretrain()``, of a small GPT on the CPU.

``HOW FOLDER [OVERRIDE ...]``: HOW is ``s3`` (by its configuration, the plugin not registered),
``registered`` (the same, and registered) or ``adam``; overrides are those of Bridge's command line.

What stands in for what a machine without a GPU lacks is in :mod:`tests.bridge.stand_ins`, and:

- the CPU for torch's GPU (:mod:`megatron_s3.mcore.cpu_device`), gloo for NCCL;
- layers of torch's for those of Transformer Engine, and no fusions;
- nothing for the building of the library that reads datasets, which megatron-core's wheel brings
  built, and without the makefile to build it with.
"""

import sys
from typing import Any

from megatron_s3.mcore import cpu_device
from tests.bridge.stand_ins import standing_in

__all__ = ["ITERATIONS", "recipe"]

ITERATIONS = 6

cpu_device.select("cpu")

from megatron.core.datasets import utils  # noqa: E402  # imports torch.cuda's names

utils.compile_helpers = lambda: None
with standing_in():
    from megatron.bridge.models import GPTModelProvider
    from megatron.bridge.recipes.common import _pretrain_common
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402

from megatron_s3 import bridge  # noqa: E402


def recipe(folder: str = "") -> Any:
    """Returns Bridge's own recipe for pretraining with Adam, for a small model."""
    config = _pretrain_common()
    config.model = GPTModelProvider(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        seq_length=32,
        vocab_size=128,
        transformer_layer_spec=lambda provider: get_gpt_layer_local_spec(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )
    config.train.train_iters = ITERATIONS
    config.train.global_batch_size, config.train.micro_batch_size = 8, 2
    config.validation.eval_iters = 0
    config.dataset.seq_length = 32
    config.dataset.num_workers = 0
    config.tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=127)
    config.ddp.average_in_collective = False  # gloo sums, and does no more
    config.dist.distributed_backend = "gloo"
    config.scheduler.lr_warmup_iters = 2
    config.logger.log_interval = 1
    config.logger.tensorboard_dir = None
    config.checkpoint.save = config.checkpoint.load = folder
    config.checkpoint.save_interval = 3
    return config


def main() -> None:
    """Trains."""
    how, folder, *overrides = sys.argv[1:]
    if how == "registered":
        import megatron_s3

        megatron_s3.register()
    config = recipe(folder)
    if how != "adam":
        bridge.use_s3(config)
    process_config_with_overrides(config, cli_overrides=overrides)
    pretrain(config, forward_step, callbacks=[bridge.MetricsCallback(updates=how != "adam")])
    # In one write, or the lines of two ranks may mix.
    sys.stdout.write(f"wrapped: {'megatron_s3.mcore.seams' in sys.modules}\n")


if __name__ == "__main__":
    main()
