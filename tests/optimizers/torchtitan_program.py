"""torchtitan's own trainer with the configuration of megatron_s3/optimizers/README.md, on the CPU.

``FOLDER STEPS``: trains a small Llama that many steps, and saves every second one.  The page's
example lies in FOLDER as ``s3_configs.py``.

What stands in for what a machine without a GPU lacks:

- the CPU for torchtitan's device, with gloo, and no figures of its memory;
- torch's causal attention for FlexAttention, which has no backward pass on the CPU;
- sums for FSDP's reductions, since gloo multiplies no gradients by a factor;
- random tokens for the tokenizer and the text, which are not in torchtitan's wheel.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import scaled_dot_product_attention

torch._utils._get_available_device_type = lambda: "cpu"
for name, stand_in in {
    "current_device": lambda: 0,
    "empty_cache": lambda: None,
    "get_device_name": lambda device: "CPU",
    "get_device_properties": lambda device: SimpleNamespace(total_memory=1 << 40),
    "memory_stats": lambda device: {},
    "reset_peak_memory_stats": lambda: None,
}.items():
    setattr(torch.cpu, name, stand_in)

from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402
from torchtitan.distributed import utils  # noqa: E402
from torchtitan.models.common.attention import FlexAttention  # noqa: E402

VOCABULARY = 2048  # of torchtitan's debug model
divide = FSDPModule.set_gradient_divide_factor


def attend(q: Any, k: Any, v: Any, *, enable_gqa: bool, **rest: Any) -> tuple[Any, None]:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa), None


def divide_sums(self: FSDPModule, factor: float) -> None:
    divide(self, factor)
    self.set_force_sum_reduction_for_comms(True)


FlexAttention._compiled_flex_attn = staticmethod(attend)
FSDPModule.set_gradient_divide_factor = divide_sums
utils.set_pg_timeouts = lambda *args, **kwargs: None  # its barrier names a device


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **rest: Any) -> None:
        super().__init__()
        self.eos_id = 0

    def encode(self, *args: Any, **rest: Any) -> list[int]:
        return []

    def decode(self, *args: Any, **rest: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return VOCABULARY


class RandomTokens(BaseDataLoader):
    """Other tokens in each step and on each rank; the number of steps is its state."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(
        self, config: Config, *, dp_rank: int, seq_len: int, local_batch_size: int, **rest: Any
    ) -> None:
        self.rank, self.taken, self.shape = dp_rank, 0, (local_batch_size, seq_len)
        self.here = 0  # by this launch

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        samples, length = self.shape
        while True:
            generator = torch.Generator().manual_seed(1000 * self.rank + self.taken)
            tokens = torch.randint(VOCABULARY, (samples, length + 1), generator=generator)
            self.taken += 1
            self.here += 1
            positions = torch.arange(length).expand(self.shape)
            yield {"input": tokens[:, :-1], "positions": positions}, tokens[:, 1:].contiguous()

    def state_dict(self) -> dict[str, int]:
        return {f"taken{self.rank}": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state[f"taken{self.rank}"]


def main() -> None:
    folder, steps = sys.argv[1:]
    sys.path.insert(0, folder)
    settings = f"""
        --module s3_configs --config llama3_debugmodel_s3
        --dump_folder {folder} --checkpoint.enable --checkpoint.interval 2
        --training.steps {steps} --lr_scheduler.total_steps 4
        --training.seq_len 32 --training.local_batch_size 2
        --training.disable_cuda_graphs --parallelism.spmd_backend partial_dtensor
    """
    config = ConfigManager().parse_args(settings.split())
    config.dataloader, config.tokenizer = RandomTokens.Config(), NoTokenizer.Config()
    config.validator.enable = False
    trainer = config.build()
    trainer.train()
    print(f"steps of this launch: {trainer.dataloader.here}", flush=True)
    for optimizer in trainer.optimizers:
        print(
            type(optimizer).__name__, optimizer.param_groups[0]["step"], optimizer.path, flush=True
        )
    trainer.close()


if __name__ == "__main__":
    main()
