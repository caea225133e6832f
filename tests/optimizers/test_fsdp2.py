"""Models that torch shards on two ranks, without Megatron: what FSDP2 needs of an optimizer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from megatron_s3 import S3
from megatron_s3.kernels.statistics import Statistics
from megatron_s3.optimizers import OPTIMIZERS, AdamW
from tests.harness.ranks import on_ranks

RANKS = 2


class Model(nn.Module):
    """Sizes that two ranks share evenly, unevenly and not at all (a scalar's worth)."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Linear(16, 8, bias=False)
        self.uneven = nn.Linear(8, 7)
        self.single = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.uneven(self.even(x).relu()) * self.single


def model(dtype: torch.dtype, ranks: int = RANKS) -> Model:
    torch.manual_seed(0)
    made = Model().to(dtype)
    if ranks:
        mesh = init_device_mesh("cpu", (ranks,))
        for part in (made.even, made.uneven, made):
            fully_shard(part, mesh=mesh)
    return made


def grads(made: Model, seed: int) -> None:
    """Equal gradients, whole or each rank's part of them."""
    generator = torch.Generator().manual_seed(seed)
    for param in made.parameters():
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = grad


def assert_same(one: Model, first, other: Model, second) -> None:
    """Bitwise: parameters, every state, and the groups' numbers."""
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.detach().full_tensor(), b.detach())
        assert first.state[a].keys() == second.state[b].keys()
        for name, state in first.state[a].items():
            assert isinstance(state, DTensor) and state.dtype == second.state[b][name].dtype
            assert torch.equal(state.full_tensor(), second.state[b][name]), name
    for a, b in zip(first.param_groups, second.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {
            k: v for k, v in b.items() if k != "params"
        }


def stepped(each: Model, optimizer: Any, *seeds: int) -> None:
    for seed in seeds:
        grads(each, seed)
        optimizer.step()


COMPACT = {"exp_avg": torch.int8, "exp_pnorm": torch.bfloat16}
CASES = {
    "fp32": ("s3", torch.float32, {}),
    "bf16, portable": ("s3", torch.bfloat16, {"fused": False}),
    "bf16, bf16 states": ("s3", torch.bfloat16, {"state_dtype": torch.bfloat16}),
    "int8 state": ("s3", torch.bfloat16, {"state_dtype": COMPACT}),
    "p 2.5, ramp": ("s3", torch.float32, {"p": 2.5, "beta_ramp": True}),
    **{name: (name, torch.float32, {}) for name in OPTIMIZERS if name != "s3"},
}


@pytest.mark.parametrize("case", CASES)
@on_ranks(RANKS, megatron=False)
def test_equals_the_unsharded(case: str) -> None:
    """Bitwise, given equal gradients, and in place."""
    name, dtype, options = CASES[case]
    sharded, plain = model(dtype), model(dtype, ranks=0)
    one, other = (
        OPTIMIZERS[name](m.parameters(), lr=0.1, weight_decay=0.1, **options)
        for m in (sharded, plain)
    )
    memory = [p.to_local().data_ptr() for p in sharded.parameters()]
    stepped(sharded, one, 0, 1, 2)
    stepped(plain, other, 0, 1, 2)
    assert_same(sharded, one, plain, other)
    assert memory == [p.to_local().data_ptr() for p in sharded.parameters()], "not in place"
    assert one.path == other.path


@on_ranks(RANKS, megatron=False)
def test_trains() -> None:
    """What autograd and FSDP2 reduce, one batch a rank: the loss of one process on both."""
    losses = []
    for ranks in (0, RANKS):
        made = model(torch.float32, ranks)
        optimizer = S3(made.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            batch = torch.randn(2 * RANKS, 16, generator=generator)
            mine = batch.chunk(RANKS)[dist.get_rank()] if ranks else batch
            loss = made(mine).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(made(batch).square().mean())
    torch.testing.assert_close(*losses)


@on_ranks(RANKS, megatron=False)
def test_a_gradient_that_is_still_to_be_reduced_is_reduced_once() -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    values = torch.arange(6.0)
    param = nn.Parameter(distribute_tensor(values, mesh, [Replicate()]))
    plain = nn.Parameter(values.clone())
    part = torch.full((6,), 1.0 + dist.get_rank())
    param.decoupled_grad = DTensor.from_local(part, mesh, [Partial()])
    plain.grad = torch.full((6,), 3.0)
    S3([param], lr=0.1).step()
    S3([plain], lr=0.1).step()
    assert torch.equal(param.to_local(), plain)
    param.decoupled_grad = torch.ones(6)
    with pytest.raises(RuntimeError, match="is a plain tensor and the parameter a DTensor"):
        S3([param], lr=0.1).step()


@on_ranks(RANKS, megatron=False)
def test_a_nan_of_one_rank_is_refused_on_every_rank() -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    uneven = nn.Parameter(distribute_tensor(torch.arange(6.0), mesh, [Shard(0)]))
    uneven.grad = distribute_tensor(torch.tensor([0.0, 0, 0, 0, 0, float("nan")]), mesh, [Shard(0)])
    before = uneven.to_local().clone()
    with pytest.raises(RuntimeError, match="NaN or inf"):
        S3([uneven], lr=0.1, error_if_nonfinite=True).step()
    assert torch.equal(uneven.to_local(), before)


@on_ranks(RANKS, megatron=False)
def test_the_ranks_statistics_add_up_to_the_unsharded_ones() -> None:
    totals = []
    for ranks in (0, RANKS):
        made = model(torch.float32, ranks)
        optimizer = S3(made.parameters(), lr=0.1)
        optimizer.host.statistics = Statistics("cpu")
        grads(made, 0)
        optimizer.step()
        (row,) = optimizer.host.statistics.take()
        totals.append(torch.tensor([row["sum_abs_update"], row["zero_grads"]]))
    dist.all_reduce(totals[1])
    torch.testing.assert_close(*totals)


@pytest.mark.parametrize("states", [torch.float32, COMPACT], ids=["fp32", "int8 state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flatten", [False, True])
@on_ranks(RANKS, megatron=False)
def test_a_checkpoint_is_loaded_on_two_ranks_and_without_fsdp2(
    flatten: bool, dtype: torch.dtype, states: Any, tmp_path: Path
) -> None:
    """Of torch.distributed.checkpoint."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    sharded, plain = model(dtype), model(dtype, ranks=0)
    one, other = (
        S3(m.parameters(), lr=0.1, beta_ramp=True, state_dtype=states) for m in (sharded, plain)
    )
    stepped(sharded, one, 0, 1, 2)
    stepped(plain, other, 0, 1, 2, 3)
    saved = {
        "model": get_model_state_dict(sharded),
        "optimizer": get_optimizer_state_dict(sharded, one, options=options),
    }
    dcp.save(saved, checkpoint_id=tmp_path)
    reached = []
    for ranks in (RANKS, 0):
        made = model(dtype, ranks)
        for param in made.parameters():
            param.data.zero_()
        optimizer = S3(made.parameters(), lr=0.1, beta_ramp=True, state_dtype=states)
        loaded = {
            "model": get_model_state_dict(made),
            "optimizer": get_optimizer_state_dict(made, optimizer, options=options),
        }
        dcp.load(loaded, checkpoint_id=tmp_path)
        set_model_state_dict(made, loaded["model"])
        set_optimizer_state_dict(made, optimizer, loaded["optimizer"], options=options)
        stepped(made, optimizer, 3)
        reached.append((made, optimizer))
    (on_two, its), (on_one, _) = reached
    for a, b in zip(on_one.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert_same(on_two, its, plain, other)


@on_ranks(RANKS, megatron=False)
def test_the_state_of_another_optimizer_is_refused() -> None:
    sharded = model(torch.float32)
    one = S3(sharded.parameters(), lr=0.1)
    stepped(sharded, one, 0)
    state = get_optimizer_state_dict(sharded, one)
    with pytest.raises(ValueError, match="was saved by s3"):
        set_optimizer_state_dict(sharded, AdamW(sharded.parameters(), lr=0.1), state)


@on_ranks(RANKS, megatron=False)
def test_a_copy_is_sharded_as_well() -> None:
    sharded = model(torch.bfloat16)
    optimizer = S3(sharded.parameters(), lr=0.1)
    stepped(sharded, optimizer, 0)
    states = copy.deepcopy(optimizer).state.values()
    assert states and all(isinstance(t, DTensor) for state in states for t in state.values())


@on_ranks(RANKS, megatron=False)
def test_a_rank_counts_no_updates_of_what_it_holds_no_element_of() -> None:
    """The ranks that do know them."""
    from megatron_s3.optimizers.counts import Counts, GroupUpdates, Update, is_empty

    mesh = init_device_mesh("cpu", (RANKS,))
    one, both = (
        nn.Parameter(distribute_tensor(torch.ones(rows, 4), mesh, [Shard(0)])) for rows in (1, 2)
    )
    empty = dist.get_rank() == 1
    assert is_empty(one) is empty and not is_empty(both)
    operands: Any = None
    for count in ("advance", "begin", "keep"):
        counts, group = Counts(), {"params": [both, one], "step": 3}
        if count == "advance":  # the other one has no gradient
            counts.advance([GroupUpdates(group, {}, True, [Update(both, both, operands, [])])])
        elif count == "begin":
            counts.begin(group, [one])
        else:
            counts.keep(group)
            group["step"] = 4
            assert counts.of(both, group) == 3
        assert counts.of(one, group) == (group["step"] if empty else 0 if count == "begin" else 3)


@on_ranks(1, megatron=False)
def test_gradients_of_shards_that_move_are_followed() -> None:
    """A DTensor has no address of its own, so that no step with one is repeated unseen."""
    mesh = init_device_mesh("cpu", (1,))
    plain = nn.Parameter(torch.ones(8))
    sharded = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
    one, two, kept = S3([plain]), S3([sharded]), []
    for step in range(4):
        grad = torch.full((8,), float(step + 1))
        plain.grad, sharded.grad = grad, distribute_tensor(grad.clone(), mesh, [Shard(0)])
        kept.append(sharded.grad)
        one.step()
        two.step()
        found: Any = sharded
        assert torch.equal(plain, found.to_local())
