"""What torch's optimizers take, these take; what cannot be stepped is refused before a change."""

import copy
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from megatron_s3 import S3
from megatron_s3.kernels.statistics import Statistics
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.optimizers.description import LARGEST
from tests.harness.hyperparameters import NEEDED


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Parameter:
    generator = torch.Generator("cpu").manual_seed(seed)
    param = Parameter(torch.randn(shape, generator=generator, device="cpu").to(dtype))
    param.grad = torch.randn(shape, generator=generator, device="cpu").to(dtype)
    return param


def stepped(lr: Any, **options: Any) -> Tensor:
    param = parameter(50)
    S3([param], lr=lr, **options).step()
    return param.detach()


# ---- numbers -------------------------------------------------------------------------------------

NUMBERS = [
    np.float64(0.5),
    np.float32(0.5),
    np.float16(0.5),
    np.array(0.5),
    Fraction(1, 2),
    torch.tensor([0.5]),
    torch.tensor([[0.5]]),
]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_any_real_number_is_a_rate(number: Any, fused: bool | None) -> None:
    """Bitwise as the same Python number; a decay too."""
    assert torch.equal(stepped(number, fused=fused), stepped(0.5, fused=fused))
    decayed = stepped(0.5, weight_decay=number, fused=fused)
    assert torch.equal(decayed, stepped(0.5, weight_decay=0.5, fused=fused))


def test_integers_of_numpy() -> None:
    """Bitwise."""
    assert torch.equal(stepped(np.int64(1)), stepped(1))
    assert torch.equal(stepped(np.array(2)), stepped(2.0))


def test_hyperparameters_as_numpy_numbers() -> None:
    """Bitwise; switches too."""
    given = {"beta": np.float32(0.5), "p": np.int64(2), "nesterov": np.bool_(False)}
    one, other = stepped(0.1, **given), stepped(0.1, beta=0.5, p=2, nesterov=False)
    assert torch.equal(one, other)


def test_schedulers_may_write_numpy_numbers() -> None:
    """Bitwise, over steps."""
    outcomes = []
    for kind in (np.float32, float):
        param = parameter(50)
        optimizer = S3([param], lr=1.0)
        scheduler = LambdaLR(optimizer, lambda t, kind=kind: kind(0.5**t))
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        outcomes.append(param.detach())
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("value", [np.array([0.1]), np.complex64(1), np.bool_(True), 1j, "1"])
def test_what_is_no_real_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^lr must be a number"):
        S3([parameter(3)], lr=value)


@pytest.mark.parametrize("value", [torch.tensor(1j), torch.tensor(True)])
def test_tensors_of_other_kinds_are_refused(value: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^lr must be a real number"):
        S3([parameter(3)], lr=value)


HUGE = [1e39, 10**400, Fraction(10**400), np.float64(1e39), torch.tensor(1e39).double() * 1e39]


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [*HUGE, torch.tensor(math.nan)], ids=repr)
def test_what_overflows_is_refused(name: str, value: Any) -> None:
    """From the constructor, a group, and a step, which then has changed nothing."""
    if isinstance(value, Tensor) and value.isinf():
        value = torch.tensor(1e39, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        S3([parameter(3)], **{name: value})
    params = [parameter(3), parameter(3, seed=1)]
    optimizer = S3([{"params": params[:1]}, {"params": params[1:]}])
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        optimizer.add_param_group({"params": [parameter(3, seed=2)], name: value})
    assert len(optimizer.param_groups) == 2
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not optimizer.state


def test_largest_rates_step() -> None:
    """Exact: finite in float32; float64 parameters have float64's range."""
    assert stepped(LARGEST / 4).isfinite().all()
    param = parameter(50, dtype=torch.float64)
    S3([param], lr=1e39).step()
    assert param.detach().isfinite().all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hyperparameters_beyond_float32_are_refused(name: str) -> None:
    """Each that has no upper end of its own; in float64 they are taken."""
    cls = OPTIMIZERS[name]
    for h in cls.description.hyperparameters:
        if not h.is_switch and h.high == math.inf:
            with pytest.raises(ValueError, match=rf"^{h.name} must be at most 3.4028235e"):
                cls([parameter(3)], **NEEDED.get(h.name, {}), **{h.name: 1e39})
            double = parameter(3, dtype=torch.float64)
            cls([double], **NEEDED.get(h.name, {}), **{h.name: 1e39})


def test_product_of_rate_and_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^lr \* weight_decay must be"):
        S3([parameter(3)], lr=1e30, weight_decay=1e30)


def test_hyperparameters_are_checked_at_every_step() -> None:
    """Exact: nothing changed; what a bf16 state cannot hold is refused as at construction."""
    param = parameter(3)
    optimizer = S3([param], state_dtype=torch.bfloat16)
    before = param.detach().clone()
    for beta, words in ((1.5, "^beta must be in"), (0.9999, "bfloat16")):
        optimizer.param_groups[0]["beta"] = beta
        with pytest.raises(ValueError, match=words):
            optimizer.step()
        assert torch.equal(param, before)


def test_hyperparameters_are_looked_at_before_params() -> None:
    """As in torch."""
    with pytest.raises(ValueError, match=r"^lr must be finite and not negative"):
        S3(None, lr=-1.0)


# ---- schedulers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", [OneCycleLR, CyclicLR], ids=lambda f: f.__name__)
def test_cycled_momentum_is_in_force(name: str, make: Callable[..., Any]) -> None:
    """Bitwise as when it is set by hand; the states are the gradient's averages."""
    cls = OPTIMIZERS[name]
    key = cls.description.momentum or "momentum"
    options = {"max_lr": 0.1} | (
        {"total_steps": 9} if make is OneCycleLR else {"base_lr": 0.01, "step_size_up": 3}
    )
    params = parameter(20), parameter(20)
    cycled, by_hand = (cls([param], lr=0.1) for param in params)
    scheduler = make(cycled, **options)
    for _ in range(5):
        group = cycled.param_groups[0]
        by_hand.param_groups[0] |= {"lr": group["lr"], key: group["momentum"]}
        for optimizer in (cycled, by_hand):
            optimizer.step()
        assert group[key] == by_hand.param_groups[0][key]
        assert torch.equal(*params)
        scheduler.step()
    assert "momentum" in cycled.defaults
    values = {h.name: h.default for h in cls.description.hyperparameters}
    assert by_hand.param_groups[0][key] != values[key]


def test_momentum_waits_in_a_checkpoint() -> None:
    """Exact: what a scheduler wrote since the last step is saved, loaded and then in force."""
    optimizer, other = S3([parameter(3)]), S3([parameter(3)])
    assert "momentum" not in optimizer.param_groups[0]
    optimizer.param_groups[0]["momentum"] = 0.5
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.step()
    assert other.param_groups[0]["beta"] == 0.5
    assert "momentum" not in other.param_groups[0]


def test_momentum_as_a_tensor() -> None:
    """Exact: schedulers write what they are given."""
    param = parameter(3)
    optimizer = S3([param])
    optimizer.param_groups[0]["momentum"] = torch.tensor(0.5)
    optimizer.step()
    assert optimizer.param_groups[0]["beta"] == 0.5


def test_a_group_without_gradients_is_not_asked() -> None:
    """As in torch: a momentum out of range is refused where it would be in force."""
    param = Parameter(torch.ones(3))
    optimizer = S3([param])
    optimizer.param_groups[0]["momentum"] = 5.0
    optimizer.step()


def test_momentum_out_of_range_changes_nothing() -> None:
    param = parameter(3)
    optimizer = S3([param])
    before = param.detach().clone()
    optimizer.param_groups[0]["momentum"] = 1.5
    with pytest.raises(ValueError, match=r"^beta must be"):
        optimizer.step()
    assert torch.equal(param, before)


# ---- loading -------------------------------------------------------------------------------------


def saved_and_new(dtype: torch.dtype) -> tuple[S3, S3]:
    optimizers = S3([parameter(4, 3, dtype=dtype)]), S3([parameter(4, 3, dtype=dtype)])
    optimizers[0].step()
    return optimizers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_hooks_see_and_change_the_state_as_it_is_kept(dtype: torch.dtype) -> None:
    """Exact, in torch's order: before by the dict, after by the optimizer's state."""
    optimizer, new = saved_and_new(dtype)
    (param,) = new.param_groups[0]["params"]
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    order = []

    def before(_: Any, state: dict[str, Any]) -> None:
        order.append("before")
        state["state"] = {0: {k: v + 1e-4 for k, v in state["state"][0].items()}}

    def after(optimizer: Any) -> None:
        order.append("after")
        assert optimizer.state[param]["exp_avg"].dtype == kept
        optimizer.state[param]["exp_pnorm"] = torch.full_like(param, 1.0001, dtype=kept)
        optimizer.param_groups[0]["lr"] = 0.25

    new.register_load_state_dict_pre_hook(before)
    new.register_load_state_dict_post_hook(after)
    new.load_state_dict(optimizer.state_dict())
    old = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert torch.equal(new.state[param]["exp_avg"], old["exp_avg"] + 1e-4)
    assert torch.equal(new.state[param]["exp_pnorm"], torch.full((4, 3), 1.0001, dtype=kept))
    assert new.param_groups[0]["lr"] == 0.25
    assert order == ["before", "after"]
    assert len(new._optimizer_load_state_dict_pre_hooks) == 1
    assert len(new._optimizer_load_state_dict_post_hooks) == 1


def test_a_hook_may_translate_another_optimizers_state() -> None:
    """Exact: the stamp is asked for after the hook."""
    other = torch.optim.Adam([parameter(3)])
    other.step()
    param = parameter(3)
    optimizer = S3([param])
    own = optimizer.state_dict()["param_groups"]

    def translate(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        states = {
            i: {"exp_avg": s["exp_avg"], "exp_pnorm": s["exp_avg_sq"].sqrt()}
            for i, s in state["state"].items()
        }
        return {"state": states, "param_groups": own}

    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    optimizer.register_load_state_dict_pre_hook(translate)
    optimizer.load_state_dict(other.state_dict())
    theirs = other.state[other.param_groups[0]["params"][0]]
    assert torch.equal(optimizer.state[param]["exp_avg"], theirs["exp_avg"])


def test_state_of_the_callers_own_is_kept() -> None:
    """Exact: under keys that are no parameter's, and beside a parameter's states."""
    optimizer, new = saved_and_new(torch.float32)
    optimizer.state["mine"] = 3
    optimizer.state[optimizer.param_groups[0]["params"][0]]["seen"] = 7
    new.load_state_dict(optimizer.state_dict())
    assert new.state["mine"] == 3
    assert new.state[new.param_groups[0]["params"][0]]["seen"] == 7
    new.step()


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "shape": (lambda t: t[:2].clone(), r"has shape \(2, 3\)"),
    "transposed": (lambda t: t.T.contiguous(), r"has shape \(3, 4\)"),
    "flat": (lambda t: t.flatten(), r"has shape \(12,\)"),
    "integer": (lambda t: t.long(), r"is torch\.int64"),
    "complex": (lambda t: t.to(torch.complex64), r"is torch\.complex64"),
    "sparse": (lambda t: t.to_sparse(), "is torch.sparse_coo"),
    "meta": (lambda t: t.to("meta"), "on meta"),
    "expanded": (lambda t: t[:1].expand(4, 3), "share memory"),
    "number": (lambda t: 3.0, "is of type float"),
}


@pytest.mark.parametrize("name", ["exp_avg", "exp_pnorm"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_state_changes_nothing(wrong: str, name: str) -> None:
    """Bitwise, in a step and on loading; the fault is in the last parameter."""
    spoil, words = WRONG[wrong]
    params = [parameter(5), parameter(4, 3, seed=1)]
    optimizer = S3(params)
    optimizer.step()
    good = optimizer.state[params[1]][name]
    optimizer.state[params[1]][name] = spoil(good)
    before = copy.deepcopy(params)
    with pytest.raises(RuntimeError, match=f"{name} of a .* in group 0 .*{words}"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert optimizer.param_groups[0]["step"] == 1
    new = S3([parameter(5), parameter(4, 3)])
    new.step()
    kept = copy.deepcopy(new.state_dict())
    with pytest.raises(ValueError, match=f"{name} to load for parameter 1.*{words}"):
        new.load_state_dict(optimizer.state_dict())
    for i, state in new.state_dict()["state"].items():
        assert all(torch.equal(state[k], kept["state"][i][k]) for k in state)
    assert new.state_dict()["param_groups"] == kept["param_groups"]
    optimizer.state[params[1]][name] = good
    optimizer.step()


def test_half_a_state_is_refused() -> None:
    optimizer, new = saved_and_new(torch.float32)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["exp_pnorm"]
    with pytest.raises(ValueError, match="parameter 0 has no exp_pnorm"):
        new.load_state_dict(saved)
    assert not new.state


def test_a_gradient_of_another_shape_changes_nothing() -> None:
    """Bitwise: torch lets a parameter's data be exchanged under its gradient."""
    params = [parameter(5), parameter(4, 3, seed=1)]
    optimizer = S3(params)
    params[1].data = torch.ones(3, 4)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"group 0 has shape \(4, 3\)"):
        optimizer.step()
    assert torch.equal(params[0], before)


# ---- devices, lazy modules, modes ----------------------------------------------------------------


@pytest.mark.parametrize("fused", [None, False])
def test_default_device(fused: bool | None) -> None:
    """Bitwise, statistics too: nothing is made on a device that nobody named."""
    outcomes = []
    for device in ("cpu", "meta"):
        param = parameter(100)
        optimizer = S3([param], fused=fused)
        optimizer.host.statistics = Statistics("cpu")
        torch.set_default_device(device)
        try:
            optimizer.step()
        finally:
            torch.set_default_device(None)
        outcomes.append((param.detach(), optimizer.host.statistics.values))
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lazy_modules(name: str) -> None:
    """Bitwise as the same module without laziness; state begins with the first step."""
    cls = OPTIMIZERS[name]
    lazy, plain = torch.nn.LazyLinear(3), torch.nn.Linear(4, 3)
    optimizers = cls(lazy.parameters()), cls(plain.parameters())
    optimizers[0].init_state()
    optimizers[0].step()
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    x = torch.ones(2, 4)
    lazy(x)
    lazy.load_state_dict(plain.state_dict())
    for module, optimizer in zip((lazy, plain), optimizers, strict=True):
        optimizer.param_groups[0]["step"] = 0
        module(x).square().sum().backward()
        optimizer.step()
    assert all(map(torch.equal, lazy.parameters(), plain.parameters()))


def test_states_made_in_inference_mode_are_stepped_outside() -> None:
    """Bitwise."""
    param, other = parameter(20), parameter(20)
    optimizers = S3([param], fused=False), S3([other], fused=False)
    with torch.inference_mode():
        optimizers[0].init_state()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(param, other)


def test_pickled_before_momentum_was_known() -> None:
    """Exact: schedulers find it in what an older version saved."""
    optimizer = S3([parameter(3)])
    del optimizer.defaults["momentum"]
    assert pickle.loads(pickle.dumps(optimizer)).defaults["momentum"] == 0.95


@pytest.mark.parametrize("fused", [np.bool_(False), 0, "yes"])
def test_fused_is_a_switch(fused: Any) -> None:
    if isinstance(fused, np.bool_):
        assert S3([parameter(3)], fused=fused).fused is False
    else:
        with pytest.raises(ValueError, match="fused must be True, False or None"):
            S3([parameter(3)], fused=fused)


def test_a_wrong_main_parameter_changes_nothing() -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = S3(params, lr=0.5)
    optimizer.host.master_params = True
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    optimizer.state[params[1]]["master_param"] = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"the master_param of a parameter, of shape .*group 0"):
        optimizer.step()
    assert all(map(torch.equal, before, params))


def test_hooks_see_the_saved_state_as_it_is_returned_and_may_replace_it() -> None:
    """Exact: values in place of int8 numbers, the entries of the groups, and any result."""
    params = [parameter(5), parameter(4, 3, seed=1)]
    dtypes = {"exp_avg": torch.int8, "exp_pnorm": torch.bfloat16}
    optimizer = S3(params, beta_ramp=True, state_dtype=dtypes)
    params[1].grad = None
    optimizer.step()
    params[1].grad = torch.ones(4, 3)
    optimizer.step()
    seen = []
    hook = optimizer.register_state_dict_post_hook(
        lambda _, saved: seen.append(copy.deepcopy(saved))
    )
    saved = optimizer.state_dict()
    (group,) = seen[0]["param_groups"]
    assert group == saved["param_groups"][0] and {"fractions", "steps"} <= group.keys()
    assert seen[0]["state"][1]["exp_avg"].dtype == torch.bfloat16
    hook.remove()
    optimizer.register_state_dict_post_hook(lambda _, saved: {"optimizer": saved, "mine": 3})
    assert optimizer.state_dict().keys() == {"optimizer", "mine"}
    assert len(optimizer._optimizer_state_dict_post_hooks) == 1
    S3(params, beta_ramp=True, state_dtype=dtypes).load_state_dict(
        optimizer.state_dict()["optimizer"]
    )
