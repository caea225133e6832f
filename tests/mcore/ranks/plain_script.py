"""A training script that knows nothing of the plugin: only a patched Megatron registers it."""

import megatron.training  # noqa: F401  first, as in Megatron-LM's own scripts

from megatron_s3.pretrain_gpt import main

main()
