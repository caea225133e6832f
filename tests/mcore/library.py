"""Megatron's library without its trainer: a small model and its optimizer, built in a fork.

@on_ranks(1)
def test_something(case):
    model, optimizer = build("s3")
    step(model, optimizer)
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tests.harness.ranks import on_ranks

__all__ = ["build", "equal", "globally", "inner", "on_ranks", "states", "step", "wrap"]


def build(
    name: str = "s3",
    overrides: dict | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = True,
    model: torch.nn.Module | None = None,
    ddp: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[torch.nn.Module, Any]:
    """Two linear layers (0: 40 to 30, 1: 30 to 20) in Megatron's wrappers, and their optimizer.

    Args:
        name: of the optimizer.
        overrides: ``config_overrides`` of get_megatron_optimizer.
        dtype: of the model.
        sharded: whether by the distributed optimizer.
        model: another one; the same on every rank.
        ddp: further fields of DistributedDataParallelConfig.
        **settings: attributes of OptimizerConfig, those of the plugin's flags included.
            ``plugin_log_grad_norm`` is False here, as in the trainer; None gives a library's
            default.

    Returns:
        The model and the optimizer.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped = wrap(model, dtype=dtype, sharded=sharded, ddp=ddp)
    config = OptimizerConfig(
        optimizer=name,
        lr=0.1,
        clip_grad=0.0,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=sharded,
    )
    settings = {"plugin_log_grad_norm": False} | settings
    for key, value in settings.items():  # some of which its constructor allows to Adam alone
        setattr(config, key, value)
    chosen = {} if overrides is None else {"config_overrides": overrides}
    return wrapped, get_megatron_optimizer(config, [wrapped], **chosen)


def wrap(
    model: torch.nn.Module | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = True,
    ddp: dict[str, Any] | None = None,
) -> torch.nn.Module:
    """The model of :func:`build`, in Megatron's wrappers, without an optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    config = TransformerConfig(
        num_layers=1,
        hidden_size=40,
        num_attention_heads=1,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )
    if model is None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
    model.config = config
    if dtype != torch.float32:
        model = Float16Module(config, model)
    settings = {"use_distributed_optimizer": sharded, "grad_reduce_in_fp32": True} | (ddp or {})
    return DistributedDataParallel(config, DistributedDataParallelConfig(**settings), model)


def step(model: torch.nn.Module, optimizer: Any, seed: int = 0, scale: float = 1.0) -> Any:
    """One step with normally distributed gradients, other ones on each rank.

    Returns:
        What the optimizer's step returns: success, gradient norm, number of zeros.
    """
    model.zero_grad_buffer()
    optimizer.zero_grad()
    torch.manual_seed(100 * seed + torch.distributed.get_rank())
    for param in model.parameters():
        if param.requires_grad:
            param.main_grad.copy_(torch.randn(param.shape) * scale)
    model.finish_grad_sync()
    return optimizer.step()


@contextlib.contextmanager
def globally(args: Namespace) -> Iterator[None]:
    """Inside, these are Megatron's arguments."""
    from megatron.training import global_vars

    global_vars._GLOBAL_ARGS = args
    try:
        yield
    finally:
        global_vars._GLOBAL_ARGS = None


def inner(optimizer: Any) -> Any:
    """The torch optimizer in a Megatron optimizer of one part."""
    (part,) = optimizer.chained_optimizers
    return part.optimizer


def states(optimizer: Any) -> list[Any]:
    """All that the states of a Megatron optimizer of one part hold."""
    return [value for state in inner(optimizer).state.values() for value in state.values()]


def equal(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> bool:
    """Whether as many tensors are equal in pairs."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
