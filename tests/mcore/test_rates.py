"""A run goes on with other rates than a checkpoint was saved with, where it is said whose count."""

import contextlib
import copy
import io
from argparse import Namespace

import pytest
import torch

from tests.harness.releases import INSTALLED, RELEASES
from tests.harness.trainer import brief
from tests.mcore.library import build, globally, inner, on_ranks

KINDS = {
    "sharded": {},
    "bf16": {"sharded": False},
    "fp32": {"sharded": False, "dtype": torch.float32},
}
CASES = [f"{name} {kind} {whose}" for name in ("s3", "adam") for kind in KINDS for whose in "01"]


def rates(name: str, kind: str, lr: float, other: float):
    """An optimizer of two groups, one with another rate, each with values of its own."""
    from megatron.core.optimizer import ParamKey

    chosen = {ParamKey(name="*1.weight"): {"max_lr": other, "min_lr": 0.1 * lr}}
    _, optimizer = build(name, chosen, lr=lr, min_lr=0.1 * lr, **KINDS[kind])
    for group in inner(optimizer).param_groups:
        group["max_lr"] = group.get("max_lr") or lr  # which every group has in the trainer
    optimizer.chained_optimizers[0].state_dict()  # makes the state of torch's AdamW
    return optimizer


def of(optimizer) -> list[tuple[float, int]]:
    return [
        (group["max_lr"], sum(p.numel() for p in group["params"]))
        for group in inner(optimizer).param_groups
    ]


@pytest.mark.parametrize("case", brief(CASES, "s3 sharded 0", "adam sharded 1", "adam bf16 0"))
@pytest.mark.parametrize("release", brief(RELEASES, INSTALLED))
@on_ranks(1)
def test_other_rates_are_no_other_groups(case, release):
    """Groups with multiples of the rate stay apart."""
    name, kind, from_checkpoint = case.split()
    optimizer, resumed = rates(name, kind, 0.5, 1.0), rates(name, kind, 0.2, 0.4)
    (lr, numel), (higher, fewer) = sorted(of(resumed))
    assert (lr, higher) == (0.2, 0.4) and numel > fewer == 600
    with globally(Namespace(use_checkpoint_opt_param_scheduler=bool(int(from_checkpoint)))):
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = [(0.5, numel), (1.0, fewer)] if int(from_checkpoint) else [(0.2, numel), (0.4, 600)]
    assert sorted(of(resumed)) == expected
    assert not [n for g in inner(resumed).param_groups for n in g if "megatron_s3" in n]


@pytest.mark.parametrize("other", [0.9, 0.401])
@on_ranks(1)
def test_groups_that_only_their_rates_tell_apart_have_to_be_in_proportion(other):
    optimizer, resumed = rates("s3", "sharded", 0.5, 1.0), rates("s3", "sharded", 0.2, other)
    with pytest.raises(ValueError, match="they cannot be matched"):
        resumed.load_state_dict(optimizer.state_dict())


@on_ranks(1)
def test_groups_that_only_their_rates_tell_apart_may_be_in_another_order():
    saved = copy.deepcopy(rates("s3", "sharded", 0.5, 1.0).state_dict())
    saved["optimizer"]["param_groups"].reverse()
    resumed = rates("s3", "sharded", 0.2, 0.4)
    before = of(resumed)
    with globally(Namespace(use_checkpoint_opt_param_scheduler=True)):
        resumed.load_state_dict(saved)
    assert of(resumed) == [(2.5 * rate, numel) for rate, numel in before]


@pytest.mark.parametrize("name", ["s3", "adam"])
@on_ranks(1)
def test_the_schedule_of_a_program_says_whose_rates_count(name):
    """In a program without Megatron's trainer; from the first step on."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    def schedule(lr: float, **whose: bool) -> OptimizerParamScheduler:
        return OptimizerParamScheduler(
            rates(name, "sharded", lr, 2 * lr),
            **{"init_lr": 0.0, "max_lr": lr, "min_lr": 0.1 * lr, "lr_warmup_steps": 0},
            **{"lr_decay_steps": 100, "lr_decay_style": "linear", "wd_incr_steps": 100},
            **{"start_wd": 0.1, "end_wd": 0.1, "wd_incr_style": "constant"},
            use_checkpoint_opt_param_scheduler=whose.get("checkpoint", False),
            override_opt_param_scheduler=whose.get("run", False),
        )

    saved, said = schedule(0.5), io.StringIO()
    saved.step(increment=10)
    for whose, lr in ({"checkpoint": True}, 0.5), ({"run": True}, 0.2):
        resumed, same = schedule(0.2, **whose), schedule(lr)
        with contextlib.redirect_stdout(said):
            resumed.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
            resumed.load_state_dict(saved.state_dict())
        same.step(increment=10)
        assert sorted(of(resumed.optimizer)) == sorted(of(same.optimizer))
        current = [
            sorted(g["lr"] for g in inner(s.optimizer).param_groups) for s in (resumed, same)
        ]
        assert current[0] == current[1]
    for line in (
        "was saved with max_lr=0.5 min_lr=0.05; the run continues with max_lr=0.2",
        "the schedule uses the checkpoint's max_lr=0.5 min_lr=0.05 of a param group, not",
    ):
        assert line in said.getvalue()


SCHEDULE = {"max_lr": 0.1, "min_lr": 0.01, "start_wd": 0.2, "end_wd": 0.3}


@pytest.mark.parametrize("name", SCHEDULE)
@pytest.mark.parametrize("from_checkpoint", [False, True])
@on_ranks(1)
def test_each_end_of_a_schedule_is_of_whom_it_is_said_to_be(name, from_checkpoint):
    """Where Megatron loads the param groups, and where the plugin does (torch FSDP2)."""
    from megatron_s3.mcore.checkpoint.param_groups import restore_scheduled

    resumed, saved = build(), build()
    for (_, optimizer), factor in ((resumed, 1.0), (saved, 0.5)):
        for group in inner(optimizer).param_groups:
            group.update(SCHEDULE | {name: SCHEDULE[name] * factor})
    right = SCHEDULE[name] * (0.5 if from_checkpoint else 1.0)
    state = copy.deepcopy(saved[1].state_dict())
    mine = copy.deepcopy(inner(resumed[1]).param_groups)
    with globally(Namespace(use_checkpoint_opt_param_scheduler=from_checkpoint)):
        restore_scheduled(
            Namespace(optimizer=Namespace(param_groups=mine)), state["optimizer"]["param_groups"]
        )
        resumed[1].load_state_dict(state)
    for groups in (mine, inner(resumed[1]).param_groups):
        assert [{n: group[n] for n in SCHEDULE} for group in groups] == [
            SCHEDULE | {name: right}
        ] * len(groups)


@pytest.mark.parametrize("release", RELEASES)
@on_ranks(1)
def test_a_group_that_megatron_knows_is_given_its_own_rates_wherever_it_is(release):
    from megatron_s3.mcore.checkpoint.param_groups import restore_scheduled

    current = [{"wd_mult": wd, "lr_mult": 1.0, "max_lr": 0.1} for wd in (1.0, 0.0)]
    saved = [{"wd_mult": wd, "lr_mult": 1.0, "max_lr": 0.1, "end_wd": wd} for wd in (0.0, 1.0)]
    part = Namespace(optimizer=Namespace(param_groups=current))
    with globally(Namespace(use_checkpoint_opt_param_scheduler=True)):
        restore_scheduled(part, saved)
    assert [group["end_wd"] for group in current] == [1.0, 0.0]
