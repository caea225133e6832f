"""Parameters, gradients and states of different dtypes, and the tensors a step writes beside x."""

import warnings

import pytest
import torch

from megatron_s3 import S3
from tests.harness.tensors import random

STATE = ("exp_avg", "exp_pnorm")


def parameter(n: int = 1000, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(random(n).to(dtype))


def trained(optimizer: S3, *, steps: int = 3, decoupled: torch.dtype | None = None) -> S3:
    """After steps with the same gradients wherever and however they are held."""
    for t in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                grad = random(param.numel(), seed=t + 1).bfloat16()
                if decoupled is None:
                    param.grad = grad.to(param.dtype)
                else:
                    param.decoupled_grad = grad.to(decoupled)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_decoupled_gradient_of_any_dtype_is_read_where_it_is(dtype: torch.dtype) -> None:
    """Bitwise as the gradient in the parameter's dtype."""
    one, two = parameter(), parameter()
    trained(S3([one], lr=0.1))
    trained(S3([two], lr=0.1), decoupled=dtype)
    assert torch.equal(one, two)


def test_the_model_parameter_is_written_in_the_same_pass() -> None:
    param = parameter()
    optimizer = S3([param], lr=0.1)
    optimizer.host.model_params[param] = torch.zeros(1000, dtype=torch.bfloat16)
    trained(optimizer)
    assert torch.equal(optimizer.host.model_params[param], param.detach().bfloat16())


def test_a_master_parameter_carries_what_a_bfloat16_one_rounds_away() -> None:
    """Bitwise: as a float32 main parameter that began at the rounded values."""
    model = parameter(dtype=torch.bfloat16)
    main = torch.nn.Parameter(model.detach().float())
    trained(S3([main], lr=1e-4, weight_decay=0.1))
    optimizer = S3([model], lr=1e-4, weight_decay=0.1)
    optimizer.host.master_params = True
    trained(optimizer, decoupled=torch.float32)
    assert torch.equal(optimizer.state[model]["master_param"], main)
    assert torch.equal(model, main.bfloat16())


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_of_low_precision_states(loaded: torch.dtype) -> None:
    """Bitwise into the same dtypes; else converted, and a warning says what."""
    model = parameter(dtype=torch.bfloat16)
    saved = S3([model], state_dtype=torch.bfloat16)
    saved.host.master_params = True
    trained(saved, decoupled=torch.bfloat16)
    other = S3([parameter(dtype=torch.bfloat16)], state_dtype=loaded)
    other.host.master_params = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_state_dict(saved.state_dict())
    said = [str(w.message) for w in caught]
    if loaded == torch.bfloat16:
        assert not said
    else:
        assert "exp_avg from torch.bfloat16 to torch.float32" in said[0]
    (new,), (old,) = other.state.values(), saved.state.values()
    assert {t.dtype for name, t in new.items() if name in STATE} == {loaded}
    assert new["master_param"].dtype == torch.float32
    assert all(torch.equal(new[name], old[name].to(new[name].dtype)) for name in old)


def test_a_loaded_state_is_no_memory_of_the_file() -> None:
    """Where torch would have cast it to the parameter's dtype, a copy is left to the caller."""
    optimizer = trained(S3([parameter(dtype=torch.bfloat16)]))
    saved = optimizer.state_dict()
    before = {name: saved["state"][0][name].clone() for name in STATE}
    new = S3([parameter(dtype=torch.bfloat16)])
    new.load_state_dict(saved)
    trained(new)
    assert all(torch.equal(saved["state"][0][name], before[name]) for name in STATE)


def test_a_main_parameter_is_loaded_where_one_is_kept_and_nowhere_else() -> None:
    optimizer = S3([parameter(dtype=torch.bfloat16)], lr=1e-4)
    optimizer.host.master_params = True
    saved = trained(optimizer).state_dict()
    assert "master_param" in saved["state"][0]
    for keeps in (False, True):
        new = S3([parameter(dtype=torch.bfloat16)])
        new.host.master_params = keeps
        new.load_state_dict(saved)
        (state,) = new.state.values()
        assert state.keys() == {*STATE, *(["master_param"] if keeps else [])}


def test_states_may_differ_in_dtype() -> None:
    param = parameter()
    trained(S3([param], state_dtype={"exp_avg": torch.bfloat16}))
    optimizer = S3([param], state_dtype={"exp_avg": torch.bfloat16})
    optimizer.init_state()
    assert [optimizer.state[param][name].dtype for name in STATE] == [
        torch.bfloat16,
        torch.float32,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": torch.float16}, r"exp_avg in torch.float16: its smallest number is 6e-8"),
        ({"state_dtype": torch.float8_e4m3fn}, "too coarse"),
        ({"state_dtype": {"exp_sq": torch.bfloat16}}, "state_dtype names exp_sq, but the states"),
        (
            {"state_dtype": torch.bfloat16, "beta": 0.99},
            r"exp_pnorm in torch.bfloat16 with beta=0.99, p=3: .* 1 - beta\*\*\(1/p\) = 0.0033",
        ),
        (
            {"state_dtype": {"exp_avg": torch.bfloat16}, "beta": 0.999},
            "exp_avg in torch.bfloat16 with beta=0.999",
        ),
        ({"fused": "yes"}, "fused must be True, False or None"),
        ({"state_dtype": "bfloat16"}, "state_dtype must be a torch.dtype, or a dict .*'bfloat16'"),
        ({"state_dtype": {"exp_avg": "bf16"}}, "state_dtype must be a torch.dtype, or a dict"),
    ],
)
def test_what_cannot_work_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S3([parameter()], **options)


def test_bfloat16_states_decay_wherever_they_are_allowed() -> None:
    """At the edge of what is allowed the norm still falls; just beyond it stays for ever."""

    def final(beta: float) -> float:
        param = parameter(64)
        state = {name: torch.full((64,), 1.0).bfloat16() for name in STATE}
        optimizer = S3([param], lr=0.0, beta=beta)
        optimizer.state[param] = state  # beside state_dtypes, which are checked at every step
        param.grad = torch.zeros(64)
        for _ in range(3000):
            optimizer.step()
        return state["exp_pnorm"].max().item()

    edge = (1 - 2.0**-8) ** 3
    S3.check_state_dtype("exp_pnorm", torch.bfloat16, {"beta": edge, "beta2": None, "p": 3.0})
    assert final(edge - 1e-3) < 0.6
    assert final(0.9945) > 0.9


def test_fused_true_is_an_error_where_it_cannot_be() -> None:
    param = torch.nn.Parameter(random(1000).double())
    param.grad = random(1000, seed=1).double()
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"fused=True, but .*\. No parameter was changed"):
        S3([param], fused=True).step()
    assert torch.equal(param, before)
    optimizer = S3([param])
    optimizer.step()
    assert optimizer.path.startswith("portable: ")


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        ({"fused": True}, {"fused": False}),
        ({"fused": True}, {"fused": None}),
        ({}, {"error_if_nonfinite": True}),
        ({}, {"state_dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_settings_of_the_whole_optimizer_are_refused_in_a_group(own: dict, asked: dict) -> None:
    """But for a repetition of the optimizer's own, which is left out."""
    (name,) = asked
    for algorithm in ({}, {"algorithm": "lion"}):
        with pytest.raises(ValueError, match=f"a param group has {name}=.*whole optimizer"):
            S3([{"params": [parameter()], **algorithm, **asked}], **own)
    optimizer = S3([parameter()], **own)
    with pytest.raises(ValueError, match=f"a param group has {name}="):
        optimizer.add_param_group({"params": [parameter()], **asked})
    assert len(optimizer.param_groups) == 1
    repeated = S3([{"params": [parameter()], **asked}], **own | asked)
    assert name not in repeated.param_groups[0]


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_group_may_choose_the_kernel(fused: bool) -> None:
    """torchtitan does; the constructor's value and other groups must not differ."""
    groups = [{"params": [parameter()], "fused": fused} for _ in range(2)]
    optimizer = S3(groups)
    assert optimizer.fused is fused
    assert not any("fused" in group for group in optimizer.param_groups)
    trained(optimizer)
    assert optimizer.path == ("C++ kernel" if fused else "portable: fused=False")
    with pytest.raises(ValueError, match="a param group has fused="):
        S3(
            [
                {"params": [parameter()], "fused": fused},
                {"params": [parameter()], "fused": not fused},
            ]
        )
    with pytest.raises(ValueError, match="a param group has fused="):
        S3([{"params": [parameter()]}, {"params": [parameter()], "fused": fused}])
    with pytest.raises(ValueError, match="fused must be True, False or None"):
        S3([{"params": [parameter()], "fused": "yes"}])
