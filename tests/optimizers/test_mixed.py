"""Param groups with algorithms of their own: one optimizer that applies several rules."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_s3 import S3
from megatron_s3.optimizers import OPTIMIZERS, AdamW, Lion
from tests.harness.tensors import random

PAIRS = list(itertools.permutations(sorted(OPTIMIZERS), 2))


def params() -> list[Parameter]:
    return [Parameter(random(3, 5, seed=seed)) for seed in range(4)]


def step(some: list[Parameter], optimizers: list[Any], first: int, last: int) -> None:
    for t in range(first, last):
        for i, param in enumerate(some):
            param.grad = random(*param.shape, seed=100 * t + i)
        for optimizer in optimizers:
            optimizer.step()


def states(optimizers: list[Any]) -> list[dict[str, Tensor]]:
    return [
        {name: t.clone() for name, t in optimizer.state[param].items()} | {"param": param.detach()}
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def same(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def mixed(some: list[Parameter], **more: Any) -> S3:
    """S3 with beta 0.9 for two parameters, and AdamW for the others."""
    second = {"params": some[2:], "algorithm": "adamw", "lr": 0.01, "beta1": 0.8}
    return S3([{"params": some[:2], "beta": 0.9}, second | more], lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(("base", "other"), PAIRS)
def test_the_bits_of_two_optimizers(base: str, other: str, fused: bool | None) -> None:
    """Each rule has its own hyperparameters, states and step counts; lr and decay are shared."""
    one, apart = params(), params()
    groups = [{"params": one[:2]}, {"params": one[2:], "algorithm": other, "lr": 0.01}]
    together = [OPTIMIZERS[base](groups, lr=0.1, weight_decay=0.1, fused=fused)]
    two = [
        OPTIMIZERS[base](apart[:2], lr=0.1, weight_decay=0.1, fused=fused),
        OPTIMIZERS[other](apart[2:], lr=0.01, weight_decay=0.1, fused=fused),
    ]
    step(one, together, 0, 3)
    step(apart, two, 0, 3)
    assert same(states(together), states(two))
    stamp = {"algorithm", "format", "lr", "weight_decay", "params", "step"}
    hyperparameters = [h.name for h in OPTIMIZERS[other].description.hyperparameters]
    assert together[0].param_groups[1].keys() == {*hyperparameters, *stamp}


def test_parameters_that_miss_a_step_are_counted_apart() -> None:
    """AdamW's bias correction is that of each parameter's own number of updates."""
    one, apart = params(), params()
    together, two = [mixed(one)], [S3(apart[:2], lr=0.1, weight_decay=0.1, beta=0.9)]
    two.append(AdamW(apart[2:], lr=0.01, weight_decay=0.1, beta1=0.8))  # type: ignore[arg-type]
    for some, optimizers in ((one, together), (apart, two)):
        step(some, optimizers, 0, 2)
        for param in some[:1] + some[3:]:
            param.grad = None
        for optimizer in optimizers:
            optimizer.step()
        step(some, optimizers, 2, 4)
    assert same(states(together), states(two))


def test_a_saved_state_goes_on_bitwise() -> None:
    one, other = params(), params()
    through, first = mixed(one), mixed(other)
    step(one, [through], 0, 4)
    step(other, [first], 0, 2)
    resumed = mixed(other)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    step(other, [resumed], 2, 4)
    assert same(states([through]), states([resumed]))
    assert resumed.param_groups[1]["beta1"] == 0.8


def test_copies_go_on_bitwise() -> None:
    some = params()
    optimizer = mixed(some)
    step(some, [optimizer], 0, 2)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        its = [param for group in copied.param_groups for param in group["params"]]
        step(its, [copied], 2, 4)
        again = params()
        fresh = mixed(again)
        step(again, [fresh], 0, 4)
        assert same(states([copied]), states([fresh]))


@pytest.mark.parametrize(
    "saved",
    [
        lambda some: S3([{"params": some[:2]}, {"params": some[2:]}]),
        lambda some: AdamW([{"params": some[:2]}, {"params": some[2:]}]),
        lambda some: S3([{"params": some[:2], "algorithm": "adamw"}, {"params": some[2:]}]),
        lambda some: mixed(some, algorithm="lion", beta1=0.9),
        lambda some: S3(some),
        lambda some: S3([{"params": some[:2]}, {"params": some[2:], "algorithm": "s3", "p": 2.0}]),
    ],
    ids=["S3", "AdamW", "the other way round", "Lion for AdamW", "one group", "another p"],
)
def test_what_another_mixture_saved_is_refused_both_ways(saved: Any) -> None:
    """Nothing is loaded; the message names an algorithm that does not fit."""
    some, others = params(), params()
    own, other = mixed(some), saved(others)
    step(some, [own], 0, 1)
    step(others, [other], 0, 1)
    for loads, given in ((own, other), (other, own)):
        before = copy.deepcopy(loads.state_dict())
        with pytest.raises(ValueError, match=r"means? nothing to|different number"):
            loads.load_state_dict(copy.deepcopy(given.state_dict()))
        assert repr(loads.state_dict()) == repr(before)


def test_a_state_of_another_pattern_is_refused() -> None:
    """A trainer notes the pattern of a group; what an older version saved has none."""
    saved = mixed(params(), pattern="*a").state_dict()
    for pattern in ("*b", "*a"):
        optimizer = mixed(params(), pattern=pattern)
        if pattern == "*a":
            optimizer.load_state_dict(copy.deepcopy(saved))
            continue
        with pytest.raises(ValueError, match=r"with s3 and adamw for '\*a', and this .* '\*b'"):
            optimizer.load_state_dict(copy.deepcopy(saved))
    older, other = (
        S3([{"params": some[:2]}, {"params": some[2:], "p": 2.0} | pattern])
        for some, pattern in ((params(), {}), (params(), {"pattern": "*a"}))
    )
    other.load_state_dict(copy.deepcopy(older.state_dict()))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"algorithm": "adamx"}, r"algorithm='adamx', which is no optimizer .* s3, adamw"),
        ({"algorithm": ["s3"]}, "which is no optimizer of the plugin"),
        ({"algorithm": "adamw", "p": 2.0}, "AdamW has no hyperparameter p; it has beta1"),
        ({"algorithm": "s3", "beta1": 0.9}, r"S3 .* has no hyperparameter beta1; it has beta,"),
        ({"algorithm": "adamw", "beta_1": 0.9}, "AdamW has no hyperparameter beta_1"),
        ({"algorithm": "adamw", "beta1": 2.0}, r"beta1 must be in \[0, 1\), not 2.0"),
        ({"algorithm": "adamw", "lr": -1.0}, "lr must be finite and not negative"),
        ({"algorithm": "sgdm", "betas": (0.9, 0.9)}, "has no betas"),
        ({"algorithm": "adamw", "amsgrad": True}, "AdamW does not support amsgrad"),
    ],
)
def test_a_group_that_cannot_be_is_an_error_and_nothing_is_added(
    group: dict[str, Any], message: str
) -> None:
    optimizer = mixed(params())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], **group})
    assert len(optimizer.param_groups) == 2
    assert set(optimizer.state_dtypes) == {"exp_avg", "exp_pnorm", "exp_avg_sq"}


def test_exclusive_hyperparameters_are_checked_in_a_group_of_another_optimizer() -> None:
    group = {"params": [Parameter(torch.ones(2))], "algorithm": "s3"}
    with pytest.raises(ValueError, match="exclude each other"):
        AdamW([group | {"beta_ramp": True, "bias_correction": True}])


def test_keywords_of_torch_are_those_of_the_groups_algorithm() -> None:
    group = {"params": params(), "algorithm": "adamw", "betas": (0.7, 0.8), "foreach": None}
    (group,) = S3([group]).param_groups
    assert (group["beta1"], group["beta2"]) == (0.7, 0.8)


def test_a_schedule_of_the_momentum_reaches_each_rules_own() -> None:
    some = params()
    optimizer = mixed(some)
    torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[0.1, 0.01], total_steps=10, base_momentum=0.6, max_momentum=0.7
    )
    step(some, [optimizer], 0, 1)
    assert [g.get("beta", g.get("beta1")) for g in optimizer.param_groups] == [0.7, 0.7]


def test_dtypes_of_states() -> None:
    """A dtype is for every state, a name for the states of that name; each rule has its say."""
    some = params()
    two = [{"params": some[:2]}, {"params": some[2:], "algorithm": "s3", "beta": 0.9}]
    optimizer = Lion(two, state_dtype={"exp_pnorm": torch.bfloat16})
    step(some, [optimizer], 0, 1)
    assert optimizer.state[some[2]]["exp_pnorm"].dtype == torch.bfloat16
    assert optimizer.state[some[2]]["exp_avg"].dtype == torch.float32
    repeated = {"params": some[2:], "state_dtype": torch.float32}
    S3([{"params": some[:2], "algorithm": "adamw"}, repeated])
    with pytest.raises(ValueError, match="is a setting of the whole optimizer"):
        S3([{"params": some[:2]}, repeated | {"state_dtype": torch.bfloat16}])
    with pytest.raises(ValueError, match="AdamW keeps exp_avg in float32"):
        S3([{"params": some, "algorithm": "adamw"}], state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"names exp_avg_sq, but the states of S3 .* and Lion"):
        S3([{"params": some, "algorithm": "lion"}], state_dtype={"exp_avg_sq": torch.bfloat16})


def test_the_whole_state_is_moved_and_reset() -> None:
    some = params()
    optimizer = mixed(some)
    step(some, [optimizer], 0, 2)
    optimizer.move_state("meta")
    assert all(t.is_meta for param in some for t in optimizer.state[param].values())
    again = params()
    optimizer = mixed(again)
    step(again, [optimizer], 0, 2)
    optimizer.reset_state()
    assert not any(t.any() for param in again for t in optimizer.state[param].values())
