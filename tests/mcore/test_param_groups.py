"""Which saved param group is which, of groups as they are in Megatron's checkpoints."""

import sys
from argparse import Namespace

import pytest
import torch

from tests.mcore.library import build, globally, inner, on_ranks

#: What Megatron knows a group by.
KNOWN = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}


class Part(Namespace):
    """Stands for one of Megatron's optimizers, and can be a key."""

    __hash__ = object.__hash__


def groups(*differing: dict, **equal: object) -> list[dict]:
    return [KNOWN | equal | each for each in differing]


def wd(*values: object, **equal: object) -> list[dict]:
    return groups(*({"weight_decay": value} for value in values), **equal)


@on_ranks(1)
def test_groups_are_told_apart_by_values_and_then_by_rising_rates():
    from megatron_s3.mcore.checkpoint.param_groups import pairs

    assert pairs(wd(0.1, 0.2), wd(0.1, 0.2)) == [0, 1]
    assert pairs(wd(0.1, 0.2), wd(0.2, 0.1)) == [1, 0]
    saved = groups({"max_lr": 0.5}, {"max_lr": 1.0})
    assert pairs(groups({"max_lr": 0.4}, {"max_lr": 0.2}), saved) == [1, 0]
    assert pairs(groups({"max_lr": 0.2}, {"max_lr": 0.4}), saved[::-1]) == [1, 0]
    # Of the saved ones some may be of no use.
    assert pairs(wd(0.1, 0.2), [KNOWN | {"wd_mult": 0.5}, *wd(0.2, 0.1)]) == [2, 1]
    # NeMo's names.
    nemo = [{f"pre_{n}" if "mult" in n else n: v for n, v in g.items()} for g in wd(0.2, 0.1)]
    assert pairs(wd(0.1, 0.2), nemo) == [1, 0]


@on_ranks(1)
def test_values_of_any_type_are_compared_and_parameters_are_not_looked_at():
    from megatron_s3.mcore.checkpoint.param_groups import pairs

    tensors = wd(torch.tensor(0.25), torch.tensor(0.5))
    assert pairs(tensors, wd(0.5, 0.25)) == [1, 0]
    betas = groups({"betas": [0.5, torch.tensor(0.25)]}, {"betas": (0.5, 0.5)})
    assert pairs(betas, groups({"betas": (0.5, 0.5)}, {"betas": (0.5, 0.25)})) == [1, 0]
    configs = groups({"config": {"a": 1}}, {"config": {"a": 2}})
    assert pairs(configs, configs[::-1]) == [1, 0]
    nowhere = [torch.empty(3, device="meta")]  # whose values cannot be read
    assert pairs(wd(0.1, 0.2, params=nowhere), wd(0.2, 0.1, params=[0])) == [1, 0]


@on_ranks(1)
def test_megatron_decides_where_each_group_is_the_only_one_or_there_is_none():
    from megatron_s3.mcore.checkpoint.param_groups import pairs

    one, other = KNOWN, KNOWN | {"wd_mult": 0.0}
    assert pairs([one, other], [other, one]) is None
    assert pairs([one], [other]) is None
    assert pairs([], [one]) is None


@pytest.mark.parametrize(
    ("current", "saved", "counts"),
    [
        (wd(0.1), wd(0.1, 0.2), "2 param groups .* for 1"),
        (wd(0.1, 0.2), wd(0.1), "1 param groups .* for 2"),
        (
            groups({"a": 1, "b": 1}, {"a": 2, "b": 2}),
            groups({"a": 1, "b": 2}, {"a": 2, "b": 1}),
            "2 param groups .* for 2",
        ),
    ],
)
@on_ranks(1)
def test_groups_that_cannot_be_told_apart_are_refused(current, saved, counts):
    from megatron_s3.mcore.checkpoint.param_groups import pairs

    with pytest.raises(ValueError, match=f"{counts}.*they cannot be matched"):
        pairs(current, saved)


@pytest.mark.parametrize("name", ["optimizer", "optimizer_state_dict", None])
@on_ranks(1)
def test_megatron_finds_each_group_by_its_mark_and_no_mark_is_left(name):
    """Under each name that Megatron knows, or without one; in each optimizer that it has inside."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    from megatron_s3.mcore.checkpoint.param_groups import load_state_dict

    mark, modules = "megatron_s3_group", (optimizer, distrib_optimizer)
    known = optimizer.param_group_identifier_keys
    own, inside = wd(0.1, 0.2), wd(0.1)
    part = Part(
        optimizer=Namespace(param_groups=own, sub_optimizers=[Namespace(param_groups=inside)])
    )

    def original(part, saved):
        assert all(module.param_group_identifier_keys == (mark,) for module in modules)
        inside[0][mark] = own[0][mark]
        return saved

    holder = {"param_groups": wd(0.2, 0.1), "state": "s"}
    saved = holder if name is None else {name: holder, "grad_scaler": "g"}
    marked = load_state_dict(original, part, saved)
    found = marked if name is None else marked[name]
    assert found is marked or marked["grad_scaler"] == "g"
    assert [group[mark] for group in found["param_groups"]] == [1, 0] and found["state"] == "s"
    assert not any(mark in group for group in (*own, *inside, *holder["param_groups"]))
    assert all(module.param_group_identifier_keys == known for module in modules)


@on_ranks(1)
def test_a_part_without_an_optimizer_is_megatrons():
    """Of a rank that has no parameter of a kind."""
    from megatron_s3.mcore.checkpoint.param_groups import load_state_dict

    saved = {"param_groups": wd(0.1, 0.2)}
    assert load_state_dict(lambda part, saved: saved, Namespace(optimizer=None), saved) is saved


@on_ranks(1)
def test_without_megatrons_trainer_nothing_says_that_a_checkpoints_rates_are_in_force():
    """Megatron-core is installed alone then."""
    from megatron_s3.mcore.checkpoint.param_groups import restore_scheduled

    current, saved = wd(0.1, max_lr=0.5), wd(0.1, max_lr=1.0)
    part = Namespace(optimizer=Namespace(param_groups=current))
    with globally(Namespace(use_checkpoint_opt_param_scheduler=True)):
        restore_scheduled(part, saved)
        assert current[0]["max_lr"] == 1.0
        sys.modules["megatron.training"] = None
        restore_scheduled(part, wd(0.1, max_lr=2.0))
    assert current[0]["max_lr"] == 1.0


@on_ranks(1)
def test_the_first_step_after_a_schedule_is_loaded_decays_as_it_says():
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    def schedule(decay: float) -> OptimizerParamScheduler:
        return OptimizerParamScheduler(
            build(weight_decay=decay, min_lr=0.01)[1],
            **{"init_lr": 0.0, "max_lr": 0.1, "min_lr": 0.01, "lr_warmup_steps": 0},
            **{"lr_decay_steps": 100, "lr_decay_style": "linear"},
            **{"start_wd": decay, "end_wd": decay, "wd_incr_steps": 100},
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=True,
            override_opt_param_scheduler=False,
        )

    saved, resumed = schedule(0.25), schedule(0.5)
    saved.step(increment=10)
    resumed.load_state_dict(saved.state_dict())
    decays, rates = (
        [{group[name] for group in inner(each.optimizer).param_groups} for each in (saved, resumed)]
        for name in ("weight_decay", "lr")
    )
    assert max(decays[0]) == 0.25 and decays[0] == decays[1] and rates[0] == rates[1]
