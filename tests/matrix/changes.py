"""Runs a program in a rank with Megatron changed: ``changes CHANGE=VALUE[,...] PROGRAM [ARGS]``."""

import copy
import re
import sys
from typing import Any

import torch

from tests.harness.forks import run_program
from tests.harness.layers import accept_parts_of_a_sequence

__all__ = ["CHANGES"]


def _freeze(pattern: str) -> None:
    """Parameters whose ``stage RANK.NAME`` matches take no part in training."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    original = GPTModel.__init__

    def init(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        for name, parameter in self.named_parameters():
            if re.search(pattern, f"stage{stage}.{name}"):
                parameter.requires_grad_(False)

    GPTModel.__init__ = init


def _attention(_: str) -> None:
    """Lets Megatron's own attention work on parts of a sequence: gathers them, and keeps its part.

    Transformer Engine's exchanges keys and values; the parts are the same (two of 2 x ranks).
    """
    from megatron.core import parallel_state
    from megatron.core.transformer import dot_product_attention as module
    from torch.distributed.nn.functional import all_gather

    cls = module.DotProductAttention
    original_init, original_forward = cls.__init__, cls.forward

    def init(self, config: Any, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        original_init(self, alone, *args, **kwargs)

    def forward(self, query, key, value, attention_mask, *args: Any, **kwargs: Any):
        group = parallel_state.get_context_parallel_group()
        size, rank = group.size(), group.rank()
        if size == 1:
            return original_forward(self, query, key, value, attention_mask, *args, **kwargs)

        def whole(part: torch.Tensor) -> torch.Tensor:
            halves = [half for p in all_gather(part.contiguous(), group) for half in p.chunk(2)]
            return torch.cat([*halves[0::2], *reversed(halves[1::2])])

        query, key, value = map(whole, (query, key, value))
        length = len(query)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        output = original_forward(self, query, key, value, mask, *args, **kwargs)
        parts = output.chunk(2 * size)
        return torch.cat([parts[rank], parts[2 * size - 1 - rank]])

    cls.__init__, cls.forward = init, forward


def _config(text: str) -> None:
    """FIELD:NUMBER of Megatron's OptimizerConfig, where no flag sets it."""
    from megatron.core.optimizer import OptimizerConfig

    name, _, number = text.partition(":")
    if not hasattr(OptimizerConfig, name):
        print(f"OptimizerConfig: error: unrecognized arguments: {name}", flush=True)
        sys.exit(2)
    original = OptimizerConfig.__post_init__

    def post_init(self) -> None:
        setattr(self, name, float(number))
        original(self)

    OptimizerConfig.__post_init__ = post_init


CHANGES = {
    "freeze": _freeze,
    "norms": lambda _: accept_parts_of_a_sequence(),
    "attention": _attention,
    "config": _config,
}


def main() -> None:
    """Makes the changes, then runs the program."""
    what, program, *argv = sys.argv[1:]
    for change in what.split(","):
        name, _, value = change.partition("=")
        CHANGES[name](value)
    run_program(program, argv)


if __name__ == "__main__":
    main()
