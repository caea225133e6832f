"""Keywords that programs written for torch.optim.AdamW pass."""

import itertools

import pytest
import torch

from megatron_s3.optimizers import OPTIMIZERS, S3, SGDM, AdamW, Adan, NAdam

NEUTRAL = {
    "foreach": None,
    "maximize": False,
    "amsgrad": False,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


def params():
    return [torch.nn.Parameter(torch.zeros(3))]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_neutral_ones_change_nothing(name):
    plain, other = OPTIMIZERS[name](params(), lr=0.1), OPTIMIZERS[name](params(), lr=0.1, **NEUTRAL)
    assert plain.defaults == other.defaults
    groups = [{"params": params(), "lr": 0.1, "foreach": False, "amsgrad": False}]
    (group,) = OPTIMIZERS[name](groups).param_groups
    assert group.keys() == plain.param_groups[0].keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("keyword", [name for name in NEUTRAL if name != "fused"])
def test_one_that_asks_for_something_is_refused_by_name(name, keyword):
    cls = OPTIMIZERS[name]
    for make in (
        lambda: cls(params(), **{keyword: True}),
        lambda: cls([{"params": params(), keyword: True}]),
    ):
        with pytest.raises(ValueError, match=f"does not support {keyword}=True: .* Leave it out"):
            make()
    optimizer = cls(params())
    with pytest.raises(ValueError, match=f"{keyword}=True"):
        optimizer.add_param_group({"params": params(), keyword: True})
    assert len(optimizer.param_groups) == 1


def test_betas_are_the_optimizers_coefficients():
    assert S3(params(), betas=(0.9, 0.9)).defaults["beta"] == 0.9
    assert S3([{"params": params(), "betas": [0.9, 0.9]}]).param_groups[0]["beta"] == 0.9
    both = AdamW(params(), betas=(0.8, 0.9)).defaults
    assert (both["beta1"], both["beta2"]) == (0.8, 0.9)
    three = Adan(params(), betas=(0.7, 0.8, 0.9)).defaults
    assert [three[f"beta{i}"] for i in (1, 2, 3)] == [0.7, 0.8, 0.9]


@pytest.mark.parametrize(
    ("cls", "given", "said"),
    [
        (
            S3,
            {"betas": (0.9, 0.95)},
            r"one coefficient, and betas=\(0.9, 0.95\) are not equal",
        ),
        (S3, {"betas": ()}, "has one coefficient"),
        (S3, {"betas": (0.9, 0.9), "beta": 0.9}, "betas=.* and beta set the same"),
        (S3, {"betas": (1.5, 1.5)}, r"beta must be in \[0, 1\), not 1.5"),
        (S3, {"eps": 1e-8}, "has no eps, which 1e-08 would set"),
        (NAdam, {"betas": (0.9,)}, r"has beta1, beta2, and betas=\(0.9,\) holds 1"),
        (SGDM, {"betas": (0.9, 0.9)}, "has no betas"),
    ],
)
def test_what_does_not_fit_is_refused(cls, given, said):
    with pytest.raises(ValueError, match=said):
        cls(params(), **given)


def test_an_eps_of_zero_is_none():
    assert "eps" not in S3(params(), eps=0.0).defaults
    assert AdamW(params(), eps=1e-6).defaults["eps"] == 1e-6


def test_the_step_is_the_same():
    results = []
    for options in ({"beta": 0.9}, {"betas": (0.9, 0.9), **NEUTRAL}):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(50))
        optimizer = S3([param], lr=0.1, **options)
        for _ in itertools.repeat(None, 3):
            param.grad = torch.randn(50)
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)
