"""States that no step has made yet, and whoever asks for them: zeros, and no error."""

import pytest
import torch

from tests.harness.releases import RELEASES
from tests.mcore.library import build, inner, on_ranks, step

HOW = (
    {},
    {"use_precision_aware_optimizer": True},
    {
        "use_precision_aware_optimizer": True,
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.5,
    },
)
#: What every format of a checkpoint asks a sharded optimizer.
READERS = {
    "get_parameter_state_dp_zero": (),
    "get_parameter_state_dp_reshardable": (),
    "sharded_param_state_dp_zero": ("model",),
    "sharded_param_state_dp_reshardable": ("model",),
    "sharded_param_state_fully_reshardable": ("model", "metadata"),
}


def named(model):
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return {
        name: ShardedTensor.from_rank_offsets(name, param, replica_id=(0, 0, 0))
        for name, param in model.named_parameters()
    }


@pytest.mark.parametrize("release", RELEASES)
@on_ranks(2)
def test_every_reader(release):
    for name in ("s3", "lion", "sgdm"):
        for settings in HOW:
            for reader, wanted in READERS.items():
                model, optimizer = build(name, **settings)
                (part,) = optimizer.chained_optimizers
                given = {"model_sharded_state_dict": named(model), "metadata": {}}
                given = [given[key] for key in given if key.partition("_")[0] in wanted]
                getattr(part, reader)(*given[:1], **{"metadata": {}} if given[1:] else {})
                states = inner(optimizer).state.values()
                assert states, (name, settings, reader)
                for state in states:
                    assert set(inner(optimizer).description.state) <= set(state)


@pytest.mark.parametrize("name", ["adam", "s3", "lion"])
@on_ranks(2)
def test_saved_before_the_first_update(name):
    """In the format torch, under fp16, whose first steps may be skipped; upstream's Adam too."""
    results = []
    for taken in (False, True):
        model, optimizer = build(name, dtype=torch.float16, initial_loss_scale=1.0)
        (part,) = optimizer.chained_optimizers
        if taken:
            state = part.get_parameter_state_dp_zero()
            part.load_parameter_state_from_dp_zero(state)
        assert step(model, optimizer)[0]
        results.append([param.detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["adam", "s3", "lion"])
@on_ranks(2)
def test_main_parameters_in_fp32_are_filled(name):
    """They are views of the model's parameters, which autograd guards."""
    model, optimizer = build(name, dtype=torch.float32)
    step(model, optimizer)
    (part,) = optimizer.chained_optimizers
    filled = 0
    for param in part.model_param_group_index_map:
        held = part._get_main_param_and_optimizer_states(param)
        wanted = {k: v + 1 if k != "step" else v for k, v in held.items()}
        part._set_main_param_and_optimizer_states(param, wanted)
        found = part._get_main_param_and_optimizer_states(param)
        assert all(torch.equal(found[k], v) for k, v in wanted.items() if k != "step")
        filled += 1
    assert filled
