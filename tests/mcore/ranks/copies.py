"""The real trainer, which counts the elements that are copied while its optimizer steps.

They are conversions (``.float()``) of gradients, and copies into the model's parameters.
"""

import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_s3

megatron_s3.register("cpu")

from megatron_s3.mcore.chained import ElementwiseChainedOptimizer  # noqa: E402
from megatron_s3.pretrain_gpt import main  # noqa: E402

COUNTED = []


class Copies(TorchDispatchMode):
    """Counts elements of converting and copying operations; collectives are not among them."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if func in copies and args[0].numel() > 1:  # not the loss scale
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


step = ElementwiseChainedOptimizer.step


def counted_step(self):
    with Copies() as copies:
        result = step(self)
    COUNTED.append(copies.elements)
    return result


ElementwiseChainedOptimizer.step = counted_step
main()
# The first step allocates; all others are alike.
assert len(set(COUNTED[1:])) == 1, COUNTED
if os.environ["RANK"] == "0":
    print(f"copied in a step: {COUNTED[-1]}", flush=True)
