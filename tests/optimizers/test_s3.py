"""S3 as a torch optimizer: state, groups, checkpoints, errors."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import megatron_s3
from megatron_s3 import S3
from megatron_s3.kernels.statistics import Statistics
from megatron_s3.optimizers.counts import Watched
from megatron_s3.optimizers.step import Step
from megatron_s3.rules.s3 import s3_update_bound
from tests.harness.reference import S3Reference
from tests.harness.tensors import random


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Parameter:
    param = Parameter(random(*shape, seed=seed, dtype=dtype))
    param.grad = random(*shape, seed=seed + 100, dtype=dtype)
    return param


def new_grads(params: list[Parameter], seed: int) -> None:
    for i, param in enumerate(params):
        param.grad = random(*param.shape, seed=1000 * seed + i, dtype=param.dtype)


def snapshot(optimizer: S3) -> list[Any]:
    """Everything a step can change, as copies."""
    return [
        (group["step"], param.detach().clone(), copy.deepcopy(dict(optimizer.state.get(param, {}))))
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def same(left: list[Any], right: list[Any]) -> bool:
    """Bitwise, NaN aside."""
    return len(left) == len(right) and all(
        a[0] == b[0]
        and torch.equal(a[1], b[1])
        and a[2].keys() == b[2].keys()
        and all(v.dtype == b[2][k].dtype and torch.equal(v, b[2][k]) for k, v in a[2].items())
        for a, b in zip(left, right, strict=True)
    )


# ---- what a step does ---------------------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {},
    {"p": 1.0},
    {"p": 2.5, "beta": 0.9},
    {"nesterov": False},
    {"bias_correction": True},
    {"bias_correction": True, "nesterov": False, "beta2": 0.99},
    {"beta2": 0.99},
    {"weight_decay": 0.1},
    {"grad_bound": 1.2},
    {"cautious": True},
    {"cautious": True, "bias_correction": True, "grad_bound": 2.0},
    {"cautious": True, "cautious_steps": 20},
    {"cautious": True, "cautious_steps": 1.0, "beta_ramp": True},
    {"beta_ramp": True},
    {"beta_ramp": True, "beta2": 0.97},
    {"beta_ramp": True, "grad_bound": 2.0, "p": 2.0, "nesterov": False},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_steps_are_the_papers(options: dict[str, Any]) -> None:
    """Bound 2e-6 of lr in u (20 roundings a step, 20 steps' memory, gradients of magnitude 1).

    In x that adds up over the steps, with two roundings of x a step.
    """
    param = parameter(7, 5)
    run = S3Reference(param.detach(), **options)
    optimizer = S3([param], lr=0.05, **options)
    probe = torch.nn.Parameter(torch.zeros(7, 5))  # from 0 with a rate of 1 it becomes -u
    observer = S3([probe], lr=1.0, **options)
    for t in range(50):
        new_grads([param], t)
        expected = run.step(param.grad, 0.05)
        optimizer.step()
        torch.nn.init.zeros_(probe)
        probe.grad = param.grad
        observer.step()
        assert (-probe.detach() - expected).abs().max() < 5e-6
    assert (param - run.x).abs().max() < 50 * (0.05 * 5e-6 + 2 * 2.0**-22)


def test_float64_is_the_reference() -> None:
    """Rounding of float64: nothing on the way is narrowed."""
    param = parameter(7, 5, dtype=torch.float64)
    run = S3Reference(param.detach(), weight_decay=0.1)
    optimizer = S3([param], lr=0.05, weight_decay=0.1)
    for t in range(30):
        new_grads([param], t)
        run.step(param.grad, 0.05)
        optimizer.step()
    torch.testing.assert_close(param.detach(), run.x, rtol=1e-13, atol=1e-13)


def test_first_update_with_bias_correction_is_the_sign() -> None:
    """A few roundings; the correction counts steps from 1."""
    param = parameter(100)
    before, grad = param.detach().clone(), param.grad.clone()
    S3([param], lr=1.0, bias_correction=True).step()
    torch.testing.assert_close(before - param.detach(), grad.sign(), rtol=0, atol=1e-6)


def test_ramped_averages_are_without_bias() -> None:
    """Under one and the same gradient every update is its sign, from the first on."""
    param = parameter(100)
    optimizer = S3([param], lr=1.0, beta_ramp=True)
    param.grad = torch.randn(100)
    for _ in range(200):
        before = param.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - param.detach(), param.grad.sign(), rtol=0, atol=2e-5)


def test_steps_of_caution_are_those_of_the_parameter() -> None:
    """A parameter that had no gradient in the first steps is cautious in its own first steps."""
    early, late = parameter(200), parameter(200)
    options: dict[str, Any] = {"cautious": True, "cautious_steps": 2}
    optimizer = S3([early, late], lr=1.0, **options)
    own = {param: S3Reference(param.detach(), **options) for param in (early, late)}
    for t in range(6):
        new_grads([early, late], t)
        if t < 3:
            late.grad = None
        for param, run in own.items():
            if param.grad is not None:
                run.step(param.grad, 1.0)
        optimizer.step()
    for param, run in own.items():
        assert (param - run.x).abs().max() < 1e-4


def test_steps_of_caution_need_caution() -> None:
    with pytest.raises(ValueError, match=r"cautious_steps=30 has no effect without cautious\."):
        S3([parameter(1)], cautious_steps=30)


@pytest.mark.parametrize(
    ("options", "step", "refused"),
    [
        ({}, 1, False),
        ({"cautious": True}, 1, False),
        ({"cautious": True, "cautious_steps": 1000}, 1, True),
        ({"cautious": True, "cautious_steps": 1000}, 998, True),
        ({"cautious": True, "cautious_steps": 1000}, 999, True),
        ({"cautious": True, "cautious_steps": 1000}, 1000, False),
        ({"beta_ramp": True}, 1, True),
        ({"beta_ramp": True}, 171, False),
        ({"bias_correction": True}, 1, True),
    ],
    ids=str,
)
def test_what_a_later_step_changes_is_not_captured(
    options: dict[str, Any], step: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for a parameter on a GPU, where alone graphs are captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer = S3([parameter(1)], **options)
    group = optimizer.param_groups[0] | {"step": step}
    watched = Watched(group | {"step": step + 1})
    values = optimizer.group_hyperparameters(watched)
    found: Any = [(SimpleNamespace(device=torch.device("cuda")), None)]
    checked = Step(optimizer, optimizer._past)
    with pytest.raises(RuntimeError, match="the rule's arguments") if refused else nullcontext():
        checked._check_capture(group, values if watched.read else None, found)


def test_a_ramp_excludes_bias_correction() -> None:
    with pytest.raises(ValueError, match="beta_ramp and bias_correction exclude each other"):
        S3([parameter(1)], beta_ramp=True, bias_correction=True)


@pytest.mark.parametrize("fused", [None, False])
def test_one_bad_gradient_is_limited_to_what_came_before(fused: bool | None) -> None:
    """A thousand times, and inf: the denominator grows by (beta + (1-beta) 10**p)**(1/p), no more.

    A NaN is no magnitude, and stays.  Bound: 10 roundings.
    """
    param = parameter(300)
    optimizer = S3([param], lr=0.01, grad_bound=10.0, fused=fused)
    for t in range(30):
        new_grads([param], t)
        optimizer.step()
    before = optimizer.state[param]["exp_pnorm"].clone()
    new_grads([param], 99)
    param.grad[:100] *= 1e6
    param.grad[100:200] = -torch.inf
    param.grad[200:] = torch.nan
    optimizer.step()
    growth = optimizer.state[param]["exp_pnorm"] / before
    expected = torch.full((200,), (0.95 + 0.05 * 1000) ** (1 / 3))
    torch.testing.assert_close(growth[:200], expected, rtol=10 * 2.0**-24, atol=0)
    assert growth[200:].isnan().all() and param.detach()[:200].isfinite().all()


def test_separate_beta2_is_clamped_at_its_own_bound() -> None:
    """Exact up to the bound's rounding to fp32; larger than 1, which shared betas never are."""
    param = parameter(1)
    optimizer = S3([param], lr=0.0, beta=0.5, beta2=0.99, p=2.0, nesterov=False)
    optimizer.host.statistics = Statistics("cpu")
    for _ in range(20):
        param.grad = torch.ones(1)
        optimizer.step()
    assert (
        1
        < optimizer.host.statistics.take()[0]["max_abs_update"]
        <= s3_update_bound(0.5, 2, 0.99) * (1 + 2.0**-24)
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_learning_rate_as_a_tensor(decay: float) -> None:
    """Bitwise as the number in float64; float32 rounds 1 - lr wd twice more, else bitwise."""
    outcomes = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64), torch.tensor(0.01)):
        param = parameter(100)
        S3([param], lr=lr, weight_decay=decay).step()
        outcomes.append(param.detach())
    number, double, single = outcomes
    assert torch.equal(double, number)
    atol = 3 * 2.0**-22 if decay else 0
    torch.testing.assert_close(single, number, rtol=0, atol=atol)


def test_learning_rate_is_read_at_every_step() -> None:
    """Bitwise: what a scheduler writes, as number or into the tensor, is what the step takes."""
    lr = torch.tensor(1.0)
    first, second = parameter(10), parameter(10)
    by_group, by_tensor = S3([first], lr=1.0), S3([second], lr=lr)
    for value in (0.5, 0.25):
        by_group.param_groups[0]["lr"] = value
        lr.fill_(value)
        by_group.step()
        by_tensor.step()
    assert torch.equal(first, second)


def test_groups_have_their_own_values() -> None:
    """Bitwise as two optimizers."""
    a, b = parameter(10), parameter(10, seed=1)
    first = {"lr": 0.1, "beta": 0.9, "p": 2.0}
    second = {"lr": 0.01, "weight_decay": 0.1, "nesterov": False}
    optimizer = S3([{"params": [a], **first}, {"params": [b], **second}])
    c, d = parameter(10), parameter(10, seed=1)
    apart = [S3([c], **first), S3([d], **second)]
    for t in range(3):
        for params, steppers in (([a, b], [optimizer]), ([c, d], apart)):
            new_grads(params, t)
            for stepper in steppers:
                stepper.step()
    assert same(snapshot(optimizer), snapshot(apart[0]) + snapshot(apart[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_state_dtypes(dtype: torch.dtype) -> None:
    """Exact: float64 for float64, float32 for all others; layout and shape as the parameter's."""
    param = Parameter(random(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last))
    optimizer = S3([param])
    optimizer.init_state()
    state = optimizer.state[param]
    assert list(state) == ["exp_avg", "exp_pnorm"]
    for tensor in state.values():
        assert tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert tensor.shape == param.shape
        assert tensor.stride() == param.stride()


def test_half_precision_parameter_is_the_rounded_fp32_step() -> None:
    """Bitwise, over one step; state too."""
    half = parameter(100, dtype=torch.bfloat16)
    full = Parameter(half.detach().float())
    full.grad = half.grad.float()
    optimizers = S3([half], lr=0.1, weight_decay=0.1), S3([full], lr=0.1, weight_decay=0.1)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(half, full.bfloat16())
    for name, tensor in optimizers[0].state[half].items():
        assert torch.equal(tensor, optimizers[1].state[full][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_takes_exactly_eight_bytes_a_parameter(dtype: torch.dtype) -> None:
    """Exact count of all tensors that the optimizer reaches after a step."""
    params = [parameter(300, 7, dtype=dtype), parameter(), parameter(70_000, dtype=dtype)]
    optimizer = S3(params)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    attributes = [v for group in optimizer.param_groups for v in group.values()]
    attributes += list(vars(optimizer).values())
    assert not [v for v in attributes if isinstance(v, Tensor)]
    assert all(isinstance(v, Tensor) for v in tensors)
    count = sum(param.numel() for param in params)
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 8 * count


def test_parameters_without_a_gradient_stay() -> None:
    """Bitwise, and without state."""
    params = [parameter(5), parameter(5, seed=1)]
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer = S3(params, lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(params[1], before)
    assert list(optimizer.state) == [params[0]]


def test_parameters_with_few_or_no_elements() -> None:
    """Exact: 0-dim and empty parameters step and have state of their shape."""
    params = [parameter(), parameter(0), parameter(3, 0)]
    optimizer = S3(params, lr=1.0)
    before = params[0].item()
    optimizer.step()
    assert params[0].item() != before
    assert [optimizer.state[p]["exp_avg"].shape for p in params] == [(), (0,), (3, 0)]


def test_zero_gradients_keep_the_parameter() -> None:
    """Bitwise, without weight decay."""
    param = parameter(100)
    before = param.detach().clone()
    param.grad.zero_()
    optimizer = S3([param], lr=1.0)
    for _ in range(5):
        optimizer.step()
    assert torch.equal(param, before)


def test_closure_is_called_with_gradients_enabled() -> None:
    """Exact: its loss is returned and its gradients are the ones applied."""
    param, other = Parameter(random(4)), Parameter(random(4))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    optimizer = S3([param], lr=0.1)
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert torch.equal(loss, other.square().sum())
    other.grad = 2 * other.detach()
    optimizer = S3([other], lr=0.1)
    assert optimizer.step() is None
    assert torch.equal(param, other)


# ---- checkpoints --------------------------------------------------------------------------------


def mixed() -> list[Parameter]:
    return [parameter(6, 4, dtype=torch.bfloat16), parameter(9, seed=1), parameter(seed=2)]


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "options", [{}, {"bias_correction": True}, {"beta_ramp": True, "grad_bound": 1.2}], ids=str
)
def test_resumed_run_is_the_uninterrupted_one(options: dict[str, Any]) -> None:
    """Bitwise: state_dict through a file, bf16 parameters with their fp32 state, the step count."""
    params = mixed()
    optimizer = S3(params, lr=0.01, **options)
    for t in range(3):
        new_grads(params, t)
        optimizer.step()
    saved = through_file(optimizer.state_dict())
    resumed_params = [Parameter(param.detach().clone()) for param in params]
    resumed = S3(resumed_params, lr=0.5, **options)
    resumed.load_state_dict(saved)
    assert same(snapshot(resumed), snapshot(optimizer))
    for t in range(3, 6):
        for run, its in ((optimizer, params), (resumed, resumed_params)):
            new_grads(its, t)
            run.step()
    assert same(snapshot(resumed), snapshot(optimizer))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_step_like_the_original(copied: Callable[[S3], S3]) -> None:
    """Bitwise, and apart from it; statistics stay with the original."""
    params = [parameter(6, 4, dtype=torch.bfloat16), parameter(9, seed=1)]
    optimizer = S3(params, error_if_nonfinite=True)
    optimizer.host.statistics = Statistics("cpu")
    optimizer.step()
    twin = copied(optimizer)
    assert twin.error_if_nonfinite
    assert twin.host.statistics is None
    before = snapshot(optimizer)
    assert same(snapshot(twin), before)
    new_grads(twin.param_groups[0]["params"], 5)
    twin.step()
    assert same(snapshot(optimizer), before)
    new_grads(params, 5)
    optimizer.step()
    assert same(snapshot(twin), snapshot(optimizer))


def refused(optimizer: S3, state: dict[str, Any], *words: str) -> None:
    """Loading raises a ValueError with these words, and nothing has changed."""
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError) as error:
        optimizer.load_state_dict(state)
    for word in words:
        assert word in str(error.value)
    assert same(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


def test_state_of_adamw_is_refused() -> None:
    """Exact: nothing changed."""
    params = mixed()
    other = torch.optim.AdamW(params)
    other.step()
    optimizer = S3(params)
    optimizer.step()
    refused(optimizer, other.state_dict(), "S3", "another optimizer")


def test_state_of_another_order_is_refused() -> None:
    """Exact: r of one p has no meaning under another."""
    params = mixed()
    optimizer = S3(params, p=3.0)
    optimizer.step()
    other = S3(mixed(), p=2.0)
    other.step()
    refused(optimizer, other.state_dict(), "p=2.0", "p=3.0")


def test_a_state_that_names_no_order_is_of_the_default_one() -> None:
    optimizer = S3(mixed())
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["p"]
    S3(mixed()).load_state_dict(copy.deepcopy(saved))
    refused(S3(mixed(), p=2.0), saved, "p=3.0", "p=2.0")


def test_state_in_more_groups_is_refused_for_what_it_is() -> None:
    saved = torch.optim.AdamW([{"params": [parameter(3)]}, {"params": [parameter(3)]}])
    refused(S3([parameter(3)]), saved.state_dict(), "S3", "another optimizer")


def test_state_of_a_newer_format_is_refused() -> None:
    optimizer = S3(mixed())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["format"] = 3
    saved["param_groups"][0]["steps"] = [0] * len(saved["param_groups"][0]["params"])
    refused(optimizer, saved, "by a newer megatron_s3, in format 3")


def test_state_is_found_by_the_numbers_that_it_was_saved_with() -> None:
    """torch counts the parameters; others number them otherwise."""
    optimizer, new = S3(mixed()), S3(mixed())
    optimizer.step()
    saved = optimizer.state_dict()
    (group,) = saved["param_groups"]
    numbers = {i: 10 * i + 7 for i in group["params"]}
    renamed = {numbers[i]: state for i, state in saved["state"].items()}
    groups = [group | {"params": list(numbers.values())}]
    new.load_state_dict({"state": renamed, "param_groups": groups})
    assert new.state_dict()["state"].keys() == saved["state"].keys() != set()
    for i, state in new.state_dict()["state"].items():
        assert all(torch.equal(state[k], saved["state"][i][k]) for k in optimizer.description.state)


def test_groups_of_different_orders_load() -> None:
    """Bitwise; and each group is compared with its own."""

    def build(first: float, second: float) -> S3:
        a, b = parameter(3), parameter(3, seed=1)
        return S3([{"params": [a], "p": first}, {"params": [b], "p": second}])

    optimizer, resumed = build(2.0, 4.0), build(2.0, 4.0)
    optimizer.step()
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert [group["p"] for group in resumed.param_groups] == [2.0, 4.0]
    refused(build(4.0, 2.0), optimizer.state_dict(), "p=2.0", "p=4.0")


def test_state_of_other_parameters_is_refused() -> None:
    """Exact: torch's own check comes before any change."""
    optimizer, other = S3([parameter(3)]), S3([parameter(3), parameter(3, seed=1)])
    optimizer.step()
    other.step()
    refused(optimizer, other.state_dict())


@pytest.mark.parametrize("keep", [False, True])
def test_other_coefficients_may_be_loaded(keep: bool) -> None:
    """Exact: the saved ones win as in torch, or on request this process's; lr is the saved."""
    optimizer = S3([parameter(3)], lr=0.1, beta=0.9, beta2=0.99, nesterov=False)
    optimizer.step()
    resumed = S3([parameter(3)], lr=0.2, beta=0.5)
    resumed.host.keep_hyperparameters = keep
    resumed.load_state_dict(optimizer.state_dict())
    group = resumed.param_groups[0]
    expected = (0.5, None, True) if keep else (0.9, 0.99, False)
    assert (group["beta"], group["beta2"], group["nesterov"]) == expected
    assert (group["lr"], group["step"]) == (0.1, 1)


# ---- what is refused ----------------------------------------------------------------------------

INVALID = [
    ("lr", -0.1),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", "fast"),
    ("lr", True),
    ("weight_decay", -1.0),
    ("weight_decay", math.nan),
    ("weight_decay", None),
    ("beta", 1.0),
    ("beta", -0.1),
    ("beta", math.nan),
    ("beta", None),
    ("beta", False),
    ("p", 0.99),
    ("p", math.inf),
    ("p", math.nan),
    ("p", "3"),
    ("beta2", 1.0),
    ("beta2", -0.5),
    ("nesterov", 1),
    ("bias_correction", None),
]


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_invalid_hyperparameter_is_named_with_its_value(name: str, value: Any) -> None:
    """One ValueError, from the constructor and from a group, which is then not added."""
    with pytest.raises(ValueError) as error:
        S3([parameter(3)], **{name: value})
    assert str(error.value).startswith(name)
    assert repr(value) in str(error.value)
    optimizer = S3([parameter(3)])
    with pytest.raises(ValueError, match=rf"^{name} "):
        optimizer.add_param_group({"params": [parameter(3, seed=1)], name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "options",
    [{"p": 1}, {"p": 64.0}, {"beta": 0}, {"beta2": 0.0}, {"lr": 0}, {"lr": None}],
    ids=str,
)
def test_edges_of_the_ranges_are_allowed(options: dict[str, Any]) -> None:
    """Exact."""
    S3([parameter(3)], **options)


def test_missing_learning_rate_is_refused_at_the_step() -> None:
    """Exact: nothing changed, and a rate set later serves."""
    params = mixed()
    optimizer = S3(params, lr=None)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="lr is None"):
        optimizer.step()
    assert same(snapshot(optimizer), before)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert not same(snapshot(optimizer), before)


def test_learning_rate_of_several_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        S3([parameter(3)], lr=torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_of_other_kinds_are_refused(dtype: torch.dtype) -> None:
    """Exact: the group is not added."""
    optimizer = S3([parameter(3)])
    with pytest.raises(ValueError, match=str(dtype)):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1


def test_parameter_whose_elements_share_memory_is_refused() -> None:
    """Exact: refused before a step, which torch would break off with the state already changed."""
    with pytest.raises(ValueError, match=r"\(4, 3\) share memory"):
        S3([Parameter(torch.zeros(3).expand(4, 3))])
    S3([Parameter(torch.zeros(1).expand(1, 1))])  # one element shares with nobody


def sparse(param: Parameter) -> None:
    param.grad = torch.eye(4).to_sparse()


def complex_valued(param: Parameter) -> None:
    param.grad = None
    param.grad_dtype = None
    param.grad = torch.zeros(4, 4, dtype=torch.complex64)


@pytest.mark.parametrize("fresh", [True, False], ids=["first-step", "later-step"])
@pytest.mark.parametrize(
    ("spoil", "word"), [(sparse, "sparse"), (complex_valued, "complex")], ids=["sparse", "complex"]
)
def test_unusable_gradient_changes_nothing(
    spoil: Callable[[Parameter], None], word: str, fresh: bool
) -> None:
    """Bitwise: the fault is in the last parameter of the last group, and no other has moved."""
    if spoil is complex_valued and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch cannot hold a complex gradient of a real parameter")
    params = [parameter(5), parameter(4, 4, seed=1), parameter(4, 4, seed=2)]
    optimizer = S3([{"params": params[:1]}, {"params": params[1:]}])
    if not fresh:
        optimizer.step()
    spoil(params[-1])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=word) as error:
        optimizer.step()
    assert "shape (4, 4) in group 1" in str(error.value)
    assert same(snapshot(optimizer), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradient_is_refused_on_request(bad: float) -> None:
    """Bitwise: nothing changed; a finite one serves afterwards."""
    params = mixed()
    optimizer = S3(params, error_if_nonfinite=True)
    optimizer.step()
    params[1].grad[3] = bad
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"NaN or inf .* 1 parameters, .* \(9,\)"):
        optimizer.step()
    assert same(snapshot(optimizer), before)
    params[1].grad[3] = 0
    optimizer.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_gradient_otherwise_spoils_its_own_element(bad: float) -> None:
    """Bitwise: every other element is as it would be."""
    spoiled, clean = parameter(9), parameter(9)
    spoiled.grad[3] = bad
    for param in (spoiled, clean):
        S3([param]).step()
    others = torch.arange(9) != 3
    assert spoiled[3].isnan()
    assert torch.equal(spoiled[others], clean[others])


# ---- the package, and a model -------------------------------------------------------------------


def test_import_takes_torch_and_nothing_else() -> None:
    """Exact, by the modules: what ``import megatron_s3`` loads beyond torch is its own or stdlib.

    So neither Megatron nor anything slow comes with it.
    """
    program = (
        "import sys, torch; before = set(sys.modules); import megatron_s3\n"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before} - {'torch'})\n"
        "print(*(m for m in sys.modules if m.split('.')[0] == 'megatron'))"
    )
    root = str(Path(megatron_s3.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, megatron = run.stdout.split("\n")[:2]
    assert set(loaded.split()) - set(sys.stdlib_module_names) == {"megatron_s3"}
    assert megatron == ""


@pytest.mark.parametrize("options", [{}, {"p": 1.0}, {"bias_correction": True}], ids=str)
def test_small_model_learns(options: dict[str, Any]) -> None:
    """The loss falls to a quarter; bitwise the same in a second run."""

    def train() -> list[float]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 4, generator=generator)
        y = torch.sin(x.sum(1, keepdim=True))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = torch.nn.Sequential(
                torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
            )
        optimizer = S3(model.parameters(), lr=0.03, weight_decay=0.01, **options)
        losses = []
        for t in range(80):
            optimizer.param_groups[0]["lr"] = 0.03 * (1 - t / 80)
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = train()
    assert losses[-1] < 0.25 * losses[0]
    assert losses == train()
