"""What config_overrides ask for single parameters is in force, or an error."""

import copy
import math

import pytest
import torch

from tests.harness.releases import RELEASES
from tests.mcore.library import build, inner, on_ranks, step, wrap

WEIGHT = "*1.weight"


def override(_name=WEIGHT, **values):
    from megatron.core.optimizer import ParamKey

    return {ParamKey(name=_name): values}


def group_of(model, optimizer, name=WEIGHT):
    """The param group of a parameter, by a pattern of its name: the one with as many elements."""
    (numel,) = (p.numel() for n, p in model.named_parameters() if n.endswith(name.strip("*")))
    (group,) = (
        group
        for group in inner(optimizer).param_groups
        if [p.numel() for p in group["params"]] == [numel]
    )
    return group


OWN = [
    ("s3", {"s3_beta": 0.5}, {"beta": 0.5}),
    ("s3", {"beta": 0.5, "nesterov": False}, {"beta": 0.5, "nesterov": False}),
    ("s3", {"p": 2.0}, {"p": 2.0}),
    ("s3", {"optimizer": "s3", "wd_mult": 0.0}, {"wd_mult": 0.0}),
    ("s3", {"s3_grad_bound": 10.0}, {"grad_bound": 10.0}),
    ("adamw", {"eps": 1e-3}, {"eps": 1e-3}),
    ("nadam", {"nadam_eps": 1e-3}, {"eps": 1e-3}),
    ("adan", {"beta3": 0.5}, {"beta3": 0.5}),
    ("s3", {"lr": 0.02}, {"lr": 0.02, "max_lr": 0.02, "min_lr": 0.002}),
    ("s3", {"lr_mult": 0.2}, {"lr": 0.02, "max_lr": 0.02, "min_lr": 0.002, "lr_mult": 1.0}),
    ("s3", {"max_lr": 0.5, "min_lr": 0.1}, {"lr": 0.1, "max_lr": 0.5, "min_lr": 0.1}),
    ("s3", {"weight_decay": 0.7}, {"weight_decay": 0.7, "start_wd": 0.7, "end_wd": 0.7}),
]


@pytest.mark.parametrize(("name", "asked", "right"), OWN)
@on_ranks(1)
def test_a_group_holds_what_was_asked_for_it(name, asked, right):
    model, optimizer = build(name, override(**asked), min_lr=0.01)
    plain = group_of(*build(name, override(wd_mult=1.0), min_lr=0.01))
    group = group_of(model, optimizer)
    differing = {n: value for n, value in group.items() if n != "params" and plain.get(n) != value}
    changed = {n: value for n, value in right.items() if n not in plain or plain[n] != value}
    assert {n: group[n] for n in right} == pytest.approx(right)
    assert differing.keys() - {"default_config", "pattern"} == changed.keys()
    (other,) = (g for g in inner(optimizer).param_groups if g is not group)
    assert {n: other.get(n) for n in changed} == {n: plain.get(n) for n in changed}


@on_ranks(1)
def test_a_groups_own_beta_is_the_one_it_is_stepped_with():
    model, optimizer = build(overrides=override(s3_beta=0.5))
    step(model, optimizer)
    group = group_of(model, optimizer)
    (main,) = group["params"]
    torch.manual_seed(0)
    grads = {n: torch.randn(p.shape) for n, p in model.named_parameters()}
    (grad,) = (grad for n, grad in grads.items() if n.endswith("1.weight"))
    torch.testing.assert_close(inner(optimizer).state[main]["exp_avg"], 0.5 * grad.view(-1))


@on_ranks(1)
def test_the_schedule_keeps_a_groups_own_rate_and_decay():
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    model, optimizer = build(overrides=override(lr_mult=0.2, weight_decay=0.7), min_lr=0.01)
    scheduler = OptimizerParamScheduler(
        *(optimizer, 0.0, 0.1, 0.01, 2, 10, "linear", 0.03, 0.03, 10, "constant")
    )
    scheduler.step(6)
    group = group_of(model, optimizer)
    (other,) = (g for g in inner(optimizer).param_groups if g is not group)
    assert group["lr"] == pytest.approx(0.2 * other["lr"])
    assert other["lr"] == pytest.approx(0.055)
    assert (group["weight_decay"], other["weight_decay"]) == (0.7, 0.03)


@pytest.mark.parametrize("name", ["adamw", "nadam"])
@on_ranks(1)
def test_mup_scales_eps_as_adams(name):
    from megatron.core.optimizer import OptimizerConfig, get_mup_config_overrides

    config = OptimizerConfig(optimizer=name, lr=0.1, min_lr=0.01, adam_eps=1e-6)
    overrides = get_mup_config_overrides(config, 4.0, name)
    settings = {"min_lr": 0.01, f"{name}_eps": 1e-6}
    _, optimizer = build(name, overrides, **settings)
    _, adam = build("adam", overrides, min_lr=0.01, adam_eps=1e-6)
    eps, right = ([g["eps"] for g in inner(o).param_groups] for o in (optimizer, adam))
    assert eps == right == [1e-6, 2.5e-7]


@on_ranks(1)
def test_mup_starts_from_the_optimizers_own_eps():
    import sys

    from megatron.core.optimizer import get_mup_config_overrides
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.training import get_megatron_optimizer_config

    from tests.harness.trainer import TINY

    sys.argv = ["pretrain", *TINY, "--train-iters", "6", "--optimizer", "adamw"]
    sys.argv += ["--adamw-eps", "1e-4", "--micro-batch-size", "4"]
    args = parse_args()
    validate_args(args, {"tokenizer_type": "NullTokenizer"})
    config, _ = get_megatron_optimizer_config(args)
    (values,) = get_mup_config_overrides(config, 4.0, config.optimizer).values()
    assert values["eps"] == pytest.approx(2.5e-5)


REFUSED = [
    (
        {"optimizer": "adam"},
        r"name='\*1.weight'\] sets optimizer='adam', which is no optimizer of the plugin",
    ),
    ({"optimizer_cpu_offload": True}, "sets optimizer_cpu_offload=True"),
    ({"s3_bta": 0.5}, r"s3_bta=0.5, which is never read.* has beta, beta2, .*, and Megatron"),
    ({"eps": 1e-6}, "sets eps=1e-06, which is never read"),
    ({"betas": (0.9, 0.95)}, "sets betas"),
    ({"amsgrad": False}, "sets amsgrad=False, which is never read"),
    ({"is_expert_parallel": True}, "sets is_expert_parallel"),
    ({"s3_beta": 1.5}, r"sets s3_beta=1.5: .*must be in \[0, 1\)"),
    ({"beta": 0.5, "s3_beta": 0.6}, "to another value"),
    ({"weight_decay": -1.0}, "sets weight_decay=-1.0: it must be a finite number"),
    ({"lr": math.inf}, "sets lr=inf"),
    ({"max_lr": None}, "sets max_lr=None"),
]


@pytest.mark.parametrize(("asked", "why"), REFUSED)
@on_ranks(1)
def test_what_nothing_would_read_is_an_error(asked, why):
    with pytest.raises(ValueError, match=why):
        build(overrides=override(**asked))


@on_ranks(1)
def test_without_a_rate_there_is_none_to_multiply():
    with pytest.raises(ValueError, match="no lr to multiply"):
        build(overrides=override(lr_mult=0.5), lr=None)


@on_ranks(2)
def test_a_name_that_matches_nothing_is_an_error_on_all_ranks():
    """Alone, or as one of several."""
    from megatron.core.optimizer import ParamKey

    for key in (ParamKey(name="*2.weight"), ParamKey(name=("*0.weight", "*2.weight"))):
        with pytest.raises(ValueError, match=r"config_overrides\[name=.*matches '\*2.weight'"):
            build(overrides={key: {"p": 2.0}})


@on_ranks(2)
def test_a_predicate_that_matches_nothing_is_said():
    """Megatron's own are made for any model."""
    import contextlib
    import io

    from megatron.core.optimizer import ParamKey

    with contextlib.redirect_stdout(io.StringIO()) as said:
        build(overrides={ParamKey(attr="is_embedding_or_output_parameter"): {"p": 2.0}})
    lines = [line for line in said.getvalue().splitlines() if "matches no parameter" in line]
    assert len(lines) == (torch.distributed.get_rank() == 0)


@on_ranks(2)
def test_a_pattern_that_another_rank_has_a_parameter_for_is_of_use():
    """Each rank has a stage of the model."""
    import contextlib
    import io

    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    layers = [torch.nn.Linear(40, 40) for _ in range(1 + torch.distributed.get_rank())]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        build(overrides=override(s3_beta=0.5), model=torch.nn.Sequential(*layers), sharded=False)
    assert "matches no parameter" not in said.getvalue()


@on_ranks(1)
def test_what_is_given_by_position_goes_on_by_position():
    from megatron.core.optimizer import OptimizerConfig

    from megatron_s3.mcore import build as plugin

    class Taken(Exception):
        pass

    def builder(config, *args):
        raise Taken(*args)

    config, chunks = OptimizerConfig(optimizer="s3", lr=0.1, fp16=False), [torch.nn.Linear(2, 2)]
    with pytest.raises(Taken) as taken:
        plugin.get_megatron_optimizer(builder, config, chunks, override(beta=0.5), False, None)
    assert taken.value.args[0] is chunks and taken.value.args[2:] == (False, None)
    ((key, values),) = taken.value.args[1].items()
    assert key in override() and values == {"s3_beta": 0.5}


@on_ranks(1)
def test_what_is_announced_is_what_the_groups_hold():
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said:
        build(overrides=override(s3_beta=0.5, weight_decay=0.7), weight_decay=0.25)
    assert "with beta=0.95 or 0.5 p=3.0 " in said.getvalue()
    assert "weight_decay=0.25 or 0.7\n[megatron_s3] 1,850 parameters" in said.getvalue()


# ---- what a checkpoint gives back ----------------------------------------------------------------


def held(optimizer):
    return [
        {n: value for n, value in group.items() if n not in ("params", "step")}
        for group in inner(optimizer).param_groups
    ]


KINDS = [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)]
VALUES = [
    ("s3", {"p": 2.0}),
    ("s3", {"s3_beta": 0.5}),
    ("s3", {"weight_decay": 0.7}),
    ("s3", {"start_wd": 0.7, "end_wd": 0.7}),
    ("adamw", {"eps": 1e-3}),
    ("adam", {"weight_decay": 0.7}),
    ("adam", {"eps": 1e-3}),
    ("adam", {"max_lr": 0.7, "min_lr": 0.1}),
]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("dtype", "sharded"), KINDS)
@on_ranks(1)
def test_each_group_is_given_back_its_own(release, dtype, sharded):
    for name, values in VALUES:
        # Three groups, of which Megatron takes two or three for one another.
        overrides = override(**values) | override("*0.bias", wd_mult=0.5)
        model, optimizer = build(name, overrides, dtype=dtype, sharded=sharded, weight_decay=0.01)
        step(model, optimizer)
        for group in inner(optimizer).param_groups:
            group["lr"] = 0.3  # as a schedule would have changed it
        saved = copy.deepcopy(optimizer.state_dict())
        other_model, other = build(name, overrides, dtype=dtype, sharded=sharded, weight_decay=0.01)
        other.load_state_dict(copy.deepcopy(saved))
        assert held(other) == held(optimizer), (name, values)
        numel = [sum(p.numel() for p in g["params"]) for g in inner(other).param_groups]
        assert numel == [sum(p.numel() for p in g["params"]) for g in inner(optimizer).param_groups]
        step(other_model, other)
        # In another order, as other overrides would have built them.
        if name == "s3" and sharded:
            shuffled = copy.deepcopy(saved)
            shuffled["optimizer"]["param_groups"].reverse()
            other.load_state_dict(shuffled)
            assert held(other) == held(optimizer), (name, values)


@on_ranks(1)
def test_changed_hyperparameters_are_this_runs():
    _, optimizer = build(overrides=override(s3_beta=0.5, max_lr=0.7, min_lr=0.1))
    _, other = build(overrides=override(s3_beta=0.6, max_lr=0.7, min_lr=0.1), s3_beta=0.9)
    other.load_state_dict(optimizer.state_dict())
    assert [group["beta"] for group in held(other)] == [0.9, 0.6]


@on_ranks(1)
def test_groups_that_cannot_be_told_apart_are_an_error():
    _, optimizer = build(overrides=override(s3_beta=0.5))
    _, other = build()
    _, plain = build(overrides={})
    with pytest.raises(ValueError, match=r"has 2 param groups \(beta=0.95; beta=0.5\) for 1 of"):
        plain.load_state_dict(optimizer.state_dict())
    # Megatron's own comparison, and its own error.
    with pytest.raises((KeyError, ValueError)):
        build(overrides=override(max_lr=0.7))[1].load_state_dict(other.state_dict())


PAIRS = {
    "alike in all": ([{"eps": 1}] * 2, [{"eps": 1}] * 2, [0, 1]),
    # eps was changed for one of them, and tells nothing.
    "as often": (
        [{"eps": 1, "beta": 0.1}, {"eps": 1, "beta": 0.2}, {"eps": 2, "beta": 0.3}],
        [{"eps": 2, "beta": 0.3}, {"eps": 2, "beta": 0.2}, {"eps": 1, "beta": 0.1}],
        [2, 1, 0],
    ),
    "of NeMo": (
        [{"wd_mult": wd, "eps": eps} for wd in (1.0, 0.0) for eps in (1, 2)],
        [{"pre_wd_mult": wd, "eps": eps} for wd in (0.0, 1.0) for eps in (1, 2)],
        [2, 3, 0, 1],
    ),
    "known to Megatron": ([{"wd_mult": 1.0}], [{"wd_mult": 1.0}], None),
    "unknown to Megatron": ([{"wd_mult": 1.0}] * 2, [{"wd_mult": 0.0}] * 2, None),
}


@pytest.mark.parametrize("case", PAIRS)
@on_ranks(1)
def test_which_saved_group_is_which(case):
    from megatron_s3.mcore.checkpoint.param_groups import pairs

    current, saved, right = PAIRS[case]
    assert pairs(current, saved) == right


@on_ranks(1)
def test_nothing_stays_in_the_groups_of_an_adam_on_two_devices():
    """Which hands its groups' values on to the Adams that it has."""
    from megatron_s3.mcore.checkpoint.param_groups import _marked

    settings = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
    _, optimizer = build(
        "adam", override(wd_mult=0.5), sharded=False, dtype=torch.float32, **settings
    )
    adam = inner(optimizer)

    def marked() -> list[int]:
        return [
            len([n for group in each.param_groups for n in group if "megatron_s3" in n])
            for each in (adam, *adam.sub_optimizers)
        ]

    with _marked(adam):
        adam._sync_hdo_param_groups_to_sub_optimizers()  # as its load_state_dict does
        assert len(marked()) > 1 and all(marked())
    assert not any(marked())


@on_ranks(2)
def test_ranks_without_a_part_of_a_group_load_it_too():
    linear = torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(2)))
    model = wrap(linear)
    assert sum(p.numel() for p in model.parameters()) == 2 * 1640
    _, optimizer = build(overrides=override(s3_beta=0.5), model=linear)
    before = held(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert held(optimizer) == before
