"""Gradients that the optimizer reads where Megatron has them: in which step, and until when."""

import pytest
import torch

from tests.mcore.library import build, inner, on_ranks, step

BF16_GRADS = {"ddp": {"grad_reduce_in_fp32": False}}
AWARE = {"use_precision_aware_optimizer": True}
CASES = {
    # name: settings of build(), and whether no gradient is copied.
    "sharded": ({}, True),
    "whole": ({"sharded": False}, True),
    "in PyTorch operations": ({"plugin_no_fused": True}, False),
    "the optimizer's parameters are the model's": (AWARE, False),  # Megatron hands them on
    "scaled": ({"dtype": torch.float16, "loss_scale": 8.0}, False),
    "measured": ({"plugin_log_grad_norm": True}, False),
    "clipped": ({"clip_grad": 1.0}, False),
    "zeros counted": ({"log_num_zeros_in_grad": True}, False),
    "reduced in fp32": ({"ddp": {"grad_reduce_in_fp32": True}}, False),
}


class Mixed(torch.nn.Module):
    """A layer in half precision and a parameter in fp32, whose gradients are in fp32."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(40, 30)
        self.scale = torch.nn.Parameter(torch.ones(7))

    def bfloat16(self):
        self.linear.bfloat16()
        return self


def part_of(optimizer):
    (part,) = optimizer.chained_optimizers
    return part


def grads(optimizer, name: str) -> list[torch.Tensor]:
    """Those that are there."""
    params = [param for group in inner(optimizer).param_groups for param in group["params"]]
    found = (getattr(param, name, None) for param in params)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("case", CASES)
@on_ranks(1)
def test_no_gradient_is_copied_unless_something_else_reads_it(case):
    settings, expected = CASES[case]
    _, optimizer = build(**(BF16_GRADS | settings))
    assert optimizer.prepare_grads() is False
    assert part_of(optimizer)._grads_in_place is expected
    if expected:
        assert {grad.dtype for grad in grads(optimizer, "decoupled_grad")} == {torch.bfloat16}
        assert not grads(optimizer, "grad")


@pytest.mark.parametrize("frozen", [False, True])
@on_ranks(1)
def test_some_in_fp32_are_no_reason_to_copy_the_others(frozen):
    model = Mixed()
    model.linear.bias.requires_grad = not frozen
    _, optimizer = build(model=model, sharded=False, **BF16_GRADS)
    optimizer.prepare_grads()
    assert part_of(optimizer)._grads_in_place
    dtypes = {grad.dtype for grad in grads(optimizer, "decoupled_grad")}
    assert dtypes == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("sharded", [True, False])
@on_ranks(1)
def test_megatrons_buffers_are_let_go_of(sharded):
    """When a norm is asked for, when gradients are zeroed, and when a later step copies them."""
    model, optimizer = build(sharded=sharded, **BF16_GRADS)
    part = part_of(optimizer)

    def state() -> tuple[bool, int, int]:
        names = ("decoupled_grad", "grad")
        return part._grads_in_place, *(len(grads(optimizer, name)) for name in names)

    step(model, optimizer)
    assert state() == (True, 4, 0)
    assert part.get_grads_for_grad_norm() and state() == (False, 0, 4)
    optimizer.prepare_grads()
    assert state() == (True, 4, 0)
    step(model, optimizer, 1)
    assert state() == (True, 4, 0)
    optimizer.zero_grad()
    assert state() == (False, 0, 0)
    step(model, optimizer, 2)
    part.config.clip_grad = 1.0
    optimizer.prepare_grads()
    assert state() == (False, 0, 4)
    optimizer.zero_grad(set_to_none=False)
    if not sharded:  # Megatron's sharded one never keeps them
        assert state() == (False, 0, 4)


@pytest.mark.parametrize("sharded", [True, False])
@on_ranks(1)
def test_the_models_parameters_are_looked_for_once_and_after_a_move(sharded):
    model, optimizer = build(sharded=sharded)
    part, calls = part_of(optimizer), []
    find = part._find_model_params
    part._find_model_params = lambda: calls.append(None) or find()
    for seed in range(3):
        step(model, optimizer, seed)
    assert len(calls) == 1
    main = inner(optimizer).param_groups[0]["params"][0]
    model_param = next(model.parameters())
    moved = main if sharded else model_param
    moved.data = moved.data.clone()
    step(model, optimizer, 3)
    assert len(calls) == 2


@on_ranks(1)
def test_a_plain_tensor_is_one_that_a_kernel_can_write():
    from megatron_s3.mcore.one_pass import is_plain

    class Other(torch.Tensor):
        pass

    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)
    assert [is_plain(torch.zeros(3, dtype=dtype)) for dtype in dtypes] == [
        False,
        *[True] * 3,
        False,
    ]
    assert is_plain(torch.nn.Parameter(torch.zeros(3)))
    assert not is_plain(torch.zeros(3).as_subclass(Other))


@on_ranks(1)
def test_where_one_parameter_is_not_plain_megatron_writes_them_all():
    from megatron_s3.mcore import one_pass

    one_pass.is_plain = lambda tensor: tensor.dim() > 1
    model, optimizer = build(sharded=False)
    before = [param.detach().clone() for param in model.parameters()]
    step(model, optimizer)
    assert part_of(optimizer)._find_model_params() is None
    after = model.parameters()
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
