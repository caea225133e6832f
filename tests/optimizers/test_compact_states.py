"""States of three bytes and main parameters as remainders, in an optimizer."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_s3 import S3
from megatron_s3.kernels.compact import FRACTION, REMAINDER, split, values_of_fractions
from megatron_s3.optimizers import OPTIMIZERS
from tests.harness.tensors import bits, random

COMPACT = {"exp_avg": torch.int8, "exp_pnorm": torch.bfloat16}


def made(count: int = 1000, dtype: torch.dtype = torch.float32, **options: Any) -> S3:
    param = torch.nn.Parameter(random(count).to(dtype))
    return S3([param], **{"lr": 0.01, "weight_decay": 0.1, "state_dtype": COMPACT} | options)


def parameter(optimizer: S3) -> torch.nn.Parameter:
    (param,) = optimizer.param_groups[0]["params"]
    return param


def train(optimizer: S3, steps: int = 5, first: int = 0, cut: slice = slice(None)) -> S3:
    """Takes steps with gradients that depend on the number of the step and on the element."""
    param = parameter(optimizer)
    for t in range(first, first + steps):
        param.grad = random(1000, seed=t + 1)[cut].to(param.dtype)
        optimizer.step()
    return optimizer


def tensors(optimizer: S3) -> list[torch.Tensor]:
    param = parameter(optimizer)
    return [param.detach(), *(tensor for _, tensor in sorted(optimizer.state[param].items()))]


def same(one: S3, other: S3) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs)


def test_three_bytes_an_element() -> None:
    optimizer = train(made())
    assert sum(t.nbytes for t in tensors(optimizer)[1:]) == 3 * 1000
    assert all(h["exp_avg"].dtype == FRACTION for h in optimizer.state.values())
    assert "C++" in optimizer.path or optimizer.path.startswith("portable: ")


@pytest.mark.parametrize("options", [{}, {"beta_ramp": True}, {"grad_bound": 5.0}], ids=str)
def test_fused_and_repeated_steps_have_the_bits_of_torch_operations(options: dict) -> None:
    """The noise is that of the number of the step, also where a plan repeats it."""
    assert same(train(made(**options)), train(made(fused=False, **options)))


def test_a_step_moves_as_with_states_in_float32_but_for_rounding() -> None:
    """The parameters stay within half a learning rate on average; 50 is the most in 50 steps."""
    ours, theirs = train(made(), 50), train(made(state_dtype=torch.float32), 50)
    difference = (parameter(ours) - parameter(theirs)).abs() / 0.01
    assert 0 < difference.mean() < 0.5
    assert difference.max() < 50


def test_shards_are_rounded_as_the_whole() -> None:
    """Bitwise: the noise depends on no index."""
    whole = train(made())
    for cut in (slice(0, 317), slice(317, 1000)):
        part = made()
        part.param_groups[0]["params"] = [torch.nn.Parameter(random(1000)[cut])]
        train(part, cut=cut)
        for a, b in zip(tensors(whole), tensors(part), strict=True):
            assert torch.equal(a[cut], b)


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_copies_go_on_bitwise(copied: Callable[[S3], S3]) -> None:
    optimizer = train(made())
    other = copied(optimizer)
    assert same(train(optimizer, first=5), train(other, first=5))


def test_resuming_is_bitwise_and_silent() -> None:
    """Through a state dict of values, which names what is stored as fractions of what."""
    optimizer = train(made())
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert saved["param_groups"][0]["fractions"] == {"exp_avg": "exp_pnorm"}
    other = made()
    with torch.no_grad():
        parameter(other).copy_(parameter(optimizer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved)
    assert same(optimizer, other)
    assert "fractions" not in other.param_groups[0]
    assert same(train(optimizer, first=5), train(other, first=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_precision_loads_it(dtype: torch.dtype) -> None:
    """The values, rounded once to bfloat16; and the fractions come back from there."""
    optimizer = train(made())
    codes, norm = optimizer.state[parameter(optimizer)].values()
    other = made(state_dtype=dtype)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        other.load_state_dict(optimizer.state_dict())
    loaded = other.state[parameter(other)]
    assert torch.equal(loaded["exp_avg"], values_of_fractions(codes, norm).bfloat16().to(dtype))
    assert torch.equal(loaded["exp_pnorm"], norm.to(dtype))
    assert "fractions" not in other.param_groups[0]
    back = made()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        back.load_state_dict(other.state_dict())
    assert torch.equal(back.state[parameter(back)]["exp_avg"], codes)
    said = " ".join(str(w.message) for w in caught)
    assert ("exp_avg from torch.float32 to torch.int8" in said) == (dtype == torch.float32)


def test_a_state_that_exceeds_the_bound_is_refused() -> None:
    """Nothing is loaded; a conversion from AdamW makes such states."""
    optimizer = train(made(state_dtype=torch.float32))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"][:3] = 2 * saved["state"][0]["exp_pnorm"][:3]
    other = train(made(), 2)
    before = [t.clone() for t in tensors(other)]
    with pytest.raises(ValueError, match=r"exceeds exp_pnorm in 3 of 1,000 elements.*Nothing was"):
        other.load_state_dict(saved)
    assert all(map(torch.equal, before, tensors(other)))


def test_codes_are_never_taken_for_values() -> None:
    """A state dict made by hand of the stored tensors, and a state replaced by hand."""
    optimizer = train(made())
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = optimizer.state[parameter(optimizer)]["exp_avg"]
    for other in (made(), made(state_dtype=torch.float32)):
        with pytest.raises(ValueError, match=r"is torch.int8; a real floating-point"):
            other.load_state_dict(saved)
    other = train(made(state_dtype=torch.float32))
    other.state[parameter(other)]["exp_avg"] = saved["state"][0]["exp_avg"]
    with pytest.raises(RuntimeError, match=r"is torch.int8; a real floating-point"):
        train(other, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta2": 0.99}, "beta=0.95, beta2=0.99: int8 holds fractions of exp_pnorm"),
        ({"state_dtype": torch.int8}, "cannot keep exp_pnorm in torch.int8"),
        ({"state_dtype": {"exp_avg": torch.uint8}}, "cannot keep exp_avg in torch.uint8"),
        ({"state_dtype": {"exp_avg": torch.int16}}, "cannot keep exp_avg in torch.int16"),
    ],
    ids=str,
)
def test_what_the_bound_does_not_hold_for_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)
    made(beta2=0.95)  # the same beta


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "s3"])
def test_other_optimizers_refuse_fractions(name: str) -> None:
    cls = OPTIMIZERS[name]
    state = cls.description.state[0]
    with pytest.raises(ValueError, match=f"keeps {state} in float32, not in torch.int8"):
        cls([torch.nn.Parameter(torch.ones(3))], state_dtype={state: torch.int8})
    mixed = made()
    if state == "exp_avg":
        with pytest.raises(ValueError, match=r"keeps exp_avg in float32, not in torch.int8"):
            mixed.add_param_group(
                {"params": [torch.nn.Parameter(torch.ones(3))], "algorithm": name}
            )


def test_a_beta2_that_is_set_later_is_refused_before_a_step() -> None:
    optimizer = train(made())
    optimizer.param_groups[0]["beta2"] = 0.99
    before = [t.clone() for t in tensors(optimizer)]
    with pytest.raises(ValueError, match=r"beta2=0.99"):
        train(optimizer, 1)
    assert all(map(torch.equal, before, tensors(optimizer)))


def test_nan_stays_where_it_is() -> None:
    """In its element alone, also through a state dict."""
    optimizer = made()
    param = parameter(optimizer)
    param.grad = random(1000, seed=9)
    param.grad[7] = torch.nan
    optimizer.step()
    train(optimizer, 3)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, 3)
    assert param.isnan().nonzero().tolist() == [[7]]
    assert optimizer.state[param]["exp_pnorm"].isnan().nonzero().tolist() == [[7]]


def test_an_idle_element_comes_to_rest() -> None:
    """It moves as with states in float32; rounding to nearest would move it by 275 lr."""
    moved = {}
    for name, dtype in (("int8", COMPACT), ("float32", torch.float32)):
        optimizer = train(made(weight_decay=0.0, state_dtype=dtype), 100)
        param = parameter(optimizer)
        start = param.detach().clone()
        param.grad = torch.zeros(1000)
        for _ in range(10_000):
            optimizer.step()
        moved[name] = (param - start).abs() / 0.01
        state = optimizer.state[param].values()
        assert name == "float32" or not any(tensor.any() for tensor in state)
    assert moved["int8"].mean() < 1.1 * moved["float32"].mean()
    assert moved["int8"].max() < 1.5 * moved["float32"].max()


def test_magnitudes_do_not_matter() -> None:
    """Gradients times a power of two give the same fractions, but for the noise."""
    found = []
    for scale in (2.0**-80, 1.0, 2.0**80):
        optimizer = made()
        param = parameter(optimizer)
        for t in range(30):
            param.grad = random(1000, seed=t) * scale
            optimizer.step()
        codes, norm = optimizer.state[param].values()
        assert norm.isfinite().all() and norm.all()
        found.append(codes.float())
    assert all((codes - found[1]).abs().mean() < 2 for codes in found)


def with_masters(remainders: bool, **options: Any) -> S3:
    optimizer = made(dtype=torch.bfloat16, **options)
    optimizer.host.master_params, optimizer.host.remainders = True, remainders
    return optimizer


@pytest.mark.parametrize("fused", [None, False])
def test_main_parameters_as_remainders(fused: bool | None) -> None:
    """Bitwise a float32 main parameter, which the parameter is the nearest bfloat16 of."""
    ours, theirs = (train(with_masters(each, fused=fused), 30) for each in (True, False))
    stored, main = (each.state[parameter(each)]["master_param"] for each in (ours, theirs))
    assert (stored.dtype, main.dtype) == (REMAINDER, torch.float32)
    assert torch.equal(ours.state_dict()["state"][0]["master_param"], main)
    assert torch.equal(parameter(ours), split(main)[0])


@pytest.mark.parametrize("remainders", [True, False])
def test_a_main_parameter_is_loaded_in_either_form(remainders: bool) -> None:
    """Bitwise from a state that was saved in either; the parameter is set to match."""
    theirs = train(with_masters(True), 5)
    ours = with_masters(remainders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    if remainders:
        assert same(ours, theirs)
    with torch.no_grad():
        parameter(ours).copy_(parameter(theirs))
    for each in (ours, theirs):
        train(each, 3, first=5)
    pair = [each.state_dict()["state"][0]["master_param"] for each in (ours, theirs)]
    assert torch.equal(*pair)
