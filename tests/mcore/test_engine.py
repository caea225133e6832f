"""Two ranks: S3's sharded state through a checkpoint, with Transformer Engine and without.

Where it is not installed, Megatron is only told that it is: nothing of it would run here, but
Megatron's code for optimizers takes other branches (a step in the group, not beside each state).
"""

import importlib.util
import tempfile

import pytest
import torch

from tests.mcore import library
from tests.mcore.library import inner, on_ranks, step

METADATA = {"distrib_optim_sharding_type": "dp_reshardable"}
INSTALLED = importlib.util.find_spec("transformer_engine") is not None


def build(seed):
    torch.manual_seed(seed)
    return library.build(dtype=torch.float32, model=torch.nn.Linear(40, 30))


def tensors(optimizer):
    params = [p for g in inner(optimizer).param_groups for p in g["params"]]
    return [t for p in params for t in (p, *inner(optimizer).state[p].values())]


def alike(one, other):
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return len(pairs) % 3 == 0 and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("engine", [True] if INSTALLED else [False, True])
@on_ranks(2)
def test_the_state_is_loaded_and_goes_on(engine, steps):
    from megatron.core import dist_checkpointing
    from megatron.core.optimizer import distrib_optimizer

    if not INSTALLED:
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = engine
    model, optimizer = build(0)
    for seed in range(steps):
        assert step(model, optimizer, seed)[0]
    other_model, other = build(1)
    with tempfile.TemporaryDirectory() as directory:
        shared = [directory]
        torch.distributed.broadcast_object_list(shared)
        saved = optimizer.sharded_state_dict({}, metadata=METADATA)
        dist_checkpointing.save(saved, shared[0])
        template = other.sharded_state_dict({}, is_loading=True, metadata=METADATA)
        other.load_state_dict(dist_checkpointing.load(template, shared[0]))
        torch.distributed.barrier()
    assert alike(optimizer, other)
    group = inner(other).param_groups[0]
    assert (group["step"], group["algorithm"], group["p"]) == (steps, "s3", 3.0)
    for pair in ((model, optimizer), (other_model, other)):
        assert step(*pair, seed=7)[0]
    assert alike(optimizer, other)
