"""The trainer on the CPU with Megatron as it is: the plugin is not registered."""

import sys
from functools import partial

from megatron_s3.mcore import cpu_device

cpu_device.select("cpu")

from megatron.core.datasets import utils  # noqa: E402

from megatron_s3.mcore.arguments.flags import CPU_DEFAULTS  # noqa: E402
from megatron_s3.mcore.datasets import compile_helpers  # noqa: E402
from megatron_s3.pretrain_gpt import main  # noqa: E402

# Of the wheel, which Megatron cannot compile.
utils.compile_helpers = partial(compile_helpers, utils.compile_helpers)
assert set(CPU_DEFAULTS) == {
    "distributed_backend",
    "transformer_impl",
    "gradient_accumulation_fusion",
    "gradient_reduce_div_fusion",
    "masked_softmax_fusion",
    "apply_rope_fusion",
    "no_persist_layer_norm",
}
sys.argv += ["--distributed-backend", "gloo", "--transformer-impl", "local"]
sys.argv += ["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"]
sys.argv += ["--no-gradient-reduce-div-fusion"]
sys.argv += ["--no-rope-fusion", "--no-persist-layer-norm"]
main()
