"""Compares AdEMAMix's Triton kernel with its portable step, in Triton's interpreter."""

import torch

from megatron_s3.kernels import gpu, portable
from megatron_s3.kernels.operands import Operands
from tests.optimizers.example import ademamix_kernel  # noqa: F401
from tests.optimizers.example.ademamix import AdEMAMix, ademamix_update

given = AdEMAMix([torch.zeros(1)]).group_hyperparameters(
    {"step": 3, "beta1": 0.9, "beta2": 0.999, "beta3": 0.9999, "alpha": 5.0, "eps": 1e-8}
)
for numel in (1, 1024, 1500):
    results = []
    for step in (portable.step, gpu.step):
        generator = torch.Generator().manual_seed(0)
        x, g, m1, m2, v = (torch.randn(numel, generator=generator) for _ in range(5))
        operands = Operands(x, g, (m1, m2, v.abs_()))
        step(ademamix_update, [operands], lr=0.01, weight_decay=0.1, **given)
        results.append((x, m1, m2, v))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), numel
