"""Two ranks: S3 on a model that torch's `fully_shard` has sharded, without Megatron."""

import copy
import sys
from pathlib import Path

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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(one: Model, first, other: Model, second) -> None:
    """Bitwise: parameters, every state, and the groups' numbers."""
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(a.detach()), b.detach())
        assert first.state[a].keys() == second.state[b].keys()
        for name, state in first.state[a].items():
            assert isinstance(state, DTensor) and state.dtype == second.state[b][name].dtype
            assert torch.equal(whole(state), second.state[b][name]), name
    for a, b in zip(first.param_groups, second.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {
            k: v for k, v in b.items() if k != "params"
        }


def equals_the_unsharded(cls, dtype: torch.dtype, **options) -> None:
    sharded, plain = model(dtype), model(dtype, ranks=0)
    one = cls(sharded.parameters(), lr=0.1, weight_decay=0.1, **options)
    other = cls(plain.parameters(), lr=0.1, weight_decay=0.1, **options)
    memory = [p.to_local().data_ptr() for p in sharded.parameters()]
    for seed in range(3):
        for each, optimizer in ((sharded, one), (plain, other)):
            grads(each, seed)
            optimizer.step()
    assert_same(sharded, one, plain, other)
    assert memory == [p.to_local().data_ptr() for p in sharded.parameters()], "not in place"
    assert one.path == other.path


def trains() -> None:
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


def partial_gradients() -> None:
    """A gradient that is still to be reduced is, once, before the step."""
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
    with pytest.raises(RuntimeError, match="is whole and the parameter a DTensor"):
        S3([param], lr=0.1).step()
    uneven = nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    uneven.grad = distribute_tensor(torch.tensor([0.0, 0, 0, 0, 0, float("nan")]), mesh, [Shard(0)])
    before = uneven.to_local().clone()
    with pytest.raises(RuntimeError, match="NaN or inf"):  # on every rank, though one alone has it
        S3([uneven], lr=0.1, error_if_nonfinite=True).step()
    assert torch.equal(uneven.to_local(), before)


def statistics() -> None:
    """The ranks' totals add up to the unsharded ones."""
    totals = []
    for ranks in (0, RANKS):
        made = model(torch.float32, ranks)
        optimizer = S3(made.parameters(), lr=0.1)
        optimizer.statistics = Statistics("cpu")
        grads(made, 0)
        optimizer.step()
        (row,) = optimizer.statistics.take()
        totals.append(torch.tensor([row["sum_abs_update"], row["zero_grads"]]))
    dist.all_reduce(totals[1])
    torch.testing.assert_close(*totals)


def checkpoints(folder: Path) -> None:
    """torch.distributed.checkpoint: saved from 2 ranks, loaded on 2, and on 1 without FSDP2."""
    for dtype in (torch.float32, torch.bfloat16):
        for flatten in (False, True):
            options = StateDictOptions(flatten_optimizer_state_dict=flatten)
            sharded, plain = model(dtype), model(dtype, ranks=0)
            one, other = (S3(m.parameters(), lr=0.1, beta_ramp=True) for m in (sharded, plain))
            for seed in range(3):
                for each, optimizer in ((sharded, one), (plain, other)):
                    grads(each, seed)
                    optimizer.step()
            saved = {
                "model": get_model_state_dict(sharded),
                "optimizer": get_optimizer_state_dict(sharded, one, options=options),
            }
            here = folder / f"{dtype}-{flatten}"
            dcp.save(saved, checkpoint_id=here)
            for ranks in (RANKS, 0):
                made = model(dtype, ranks)
                for param in made.parameters():
                    param.data.zero_()
                optimizer = S3(made.parameters(), lr=0.1, beta_ramp=True)
                loaded = {
                    "model": get_model_state_dict(made),
                    "optimizer": get_optimizer_state_dict(made, optimizer, options=options),
                }
                dcp.load(loaded, checkpoint_id=here)
                set_model_state_dict(made, loaded["model"])
                set_optimizer_state_dict(made, optimizer, loaded["optimizer"], options=options)
                grads(made, 3)
                optimizer.step()
                if ranks:
                    reached = (made, optimizer)
                else:
                    grads(plain, 3)
                    other.step()
                    for a, b in zip(made.parameters(), plain.parameters(), strict=True):
                        assert torch.equal(a, b)
                    assert_same(*reached, plain, other)
            wrong = AdamW(sharded.parameters(), lr=0.1)
            state = get_optimizer_state_dict(sharded, one)
            with pytest.raises(ValueError, match="was saved by s3"):
                set_optimizer_state_dict(sharded, wrong, state)


def main(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    equals_the_unsharded(S3, torch.float32)
    equals_the_unsharded(S3, torch.bfloat16, fused=False)
    equals_the_unsharded(S3, torch.bfloat16, state_dtype=torch.bfloat16)
    equals_the_unsharded(S3, torch.float32, p=2.5, beta_ramp=True)
    for name in OPTIMIZERS:
        equals_the_unsharded(OPTIMIZERS[name], torch.float32)
    trains()
    partial_gradients()
    statistics()
    checkpoints(Path(folder))
    sharded = model(torch.bfloat16)
    optimizer = S3(sharded.parameters(), lr=0.1)
    grads(sharded, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert all(isinstance(t, DTensor) for s in twin.state.values() for t in s.values())
    dist.destroy_process_group()
    if rank == 0:
        print("fsdp2: ok", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(
        main, args=(sys.argv[1],), nprocs=RANKS, start_method="fork"
    )
