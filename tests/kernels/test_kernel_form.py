"""One definition of what kernels are given of a rule, and options that they do not know."""

import ast
import inspect
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_s3.kernels import cpu, gpu
from megatron_s3.optimizers import OPTIMIZERS, S3
from megatron_s3.optimizers.description import Hyperparameter
from megatron_s3.rules import RULES
from megatron_s3.rules.kernel_form import KernelForm, form, with_kernel
from megatron_s3.rules.s3 import s3_update
from tests.harness.hyperparameters import NEEDED

TRITON = Path(gpu.__file__).with_name("rules.py")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kernel.name)
def test_triton_unpacks_the_numbers_under_their_names(rule: Any) -> None:
    """The C++ source reads them by name; Triton before 3.4 has tuples without names."""
    functions = {
        f.name: f for f in ast.parse(TRITON.read_text()).body if isinstance(f, ast.FunctionDef)
    }
    names: list[str] = []
    for node in ast.walk(functions[rule.kernel.name]):
        if isinstance(node, ast.Assign) and "scalars" in ast.unparse(node.value):
            (target,) = node.targets
            names += [name.id for name in target.elts]
    assert tuple(names) == tuple(rule.kernel.scalars)


def test_flags_do_not_overlap() -> None:
    for rule in RULES:
        places = [rule.kernel.flag(name) for name in rule.kernel.flags]
        bits = [mask << at for at, mask in places]
        assert sum(bits) == (1 << sum(rule.kernel.flags.values())) - 1


def test_a_flag_that_has_no_room_is_an_error() -> None:
    kernel = KernelForm("odd", 1, (), lambda: {"big": 2}, {"big": 1})
    with pytest.raises(ValueError, match=r"flag big must be in \[0, 1\], not 2"):
        kernel.pack({})
    with pytest.raises(ValueError, match="big is neither a scalar nor a flag"):
        replace(kernel, flags={}).pack({})


def _steps(name: str, fused: bool | None, **changed: Any) -> tuple[Tensor, str]:
    """Returns parameter and states after 5 steps on gradients of 5 magnitudes, and the path."""
    param = torch.nn.Parameter(torch.linspace(-1, 1, 333))
    optimizer = OPTIMIZERS[name]([param], lr=0.01, fused=fused, **changed)
    generator = torch.Generator().manual_seed(1)
    for t in range(5):
        param.grad = torch.randn(333, generator=generator) * 10.0 ** (t - 2)
        optimizer.step()
    return torch.stack([param.detach(), *optimizer.state[param].values()]), optimizer.path


@pytest.mark.parametrize(
    ("name", "h"),
    [
        pytest.param(name, h, id=f"{name}-{h.name}")
        for name, cls in OPTIMIZERS.items()
        for h in cls.description.hyperparameters
    ],
)
def test_each_hyperparameter_gives_the_portable_bits_or_is_refused(
    name: str, h: Hyperparameter
) -> None:
    """It is changed alone; some of its values make another step than its default does."""
    numbers = [v for v in (0.0, 0.5, 0.875, 1.0, 1.5, 2.0, 2.5) if h.low <= v < h.high]
    needs = NEEDED.get(h.name, {})
    default, _ = _steps(name, False, **needs)
    effects = []
    for value in [not h.default] if h.is_switch else numbers:
        portable, _ = _steps(name, False, **needs, **{h.name: value})
        found, path = _steps(name, None, **needs, **{h.name: value})
        if path.startswith("portable: "):
            assert h.name in path or f"not {value:g}" in path, path
        assert torch.equal(found, portable)
        effects.append(not torch.equal(portable, default))
    assert any(effects)


def timid_update(
    grad: Tensor, exp_avg: Tensor, exp_pnorm: Tensor, *, timid: bool = False, **others: Any
) -> Tensor:
    """S3, without the elements whose update points against their gradient."""
    update = s3_update(grad, exp_avg, exp_pnorm, **others)
    return update * (update * grad > 0) if timid else update


class Timid(S3):
    """S3 with an option that no kernel knows."""

    description = replace(
        S3.description,
        name="timid",
        rule=with_kernel(s3_update.kernel)(timid_update),
        hyperparameters=(
            *S3.description.hyperparameters,
            Hyperparameter("timid", False, "leave out what points against the gradient"),
        ),
    )

    def __init__(self, params: Any, *, timid: bool = False, **others: Any) -> None:
        super(S3, self).__init__(params, timid=timid, **others)


@pytest.mark.parametrize("timid", [False, True])
def test_an_option_that_kernels_do_not_know_takes_torch_operations_by_name(
    timid: bool, caplog: pytest.LogCaptureFixture
) -> None:
    param = torch.nn.Parameter(torch.ones(8))
    optimizer = Timid([param], timid=timid, lr=0.1)
    param.grad = torch.ones(8)
    optimizer.step()
    param.grad = -0.01 * torch.ones(8)
    before = param.detach().clone()
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert torch.equal(param, before) == timid
    if timid:
        assert "does not have the option timid of timid_update" in optimizer.path
    else:
        assert optimizer.path == cpu.NAME


def test_the_gpu_names_the_option_too() -> None:
    values = {"beta": 0.95, "p": 3.0, "timid": True}
    assert "the option timid" in gpu.reason(timid_update, [], **values)
    assert form(timid_update, values | {"timid": False}) == form(
        s3_update, {"beta": 0.95, "p": 3.0}
    )


def test_every_rule_of_the_plugin_has_its_definition() -> None:
    for cls in OPTIMIZERS.values():
        rule = cls.description.rule
        assert rule in RULES
        known = set(inspect.signature(rule.kernel.numbers).parameters)
        theirs = set(inspect.signature(rule).parameters) - {"grad", *cls.description.state}
        assert known == theirs


def test_a_number_that_may_change_in_place_is_read_in_each_step() -> None:
    """Numbers alone are remembered: a tensor is the same object with another value."""
    beta = torch.tensor(0.5)
    hyperparameters = {"beta": beta, "p": 3.0}
    before = form(s3_update, hyperparameters)
    beta.fill_(0.25)
    after = form(s3_update, hyperparameters)
    assert [f.scalars[0] for f in (before, after)] == [0.5, 0.25]
    assert form(s3_update, {"beta": 0.5, "p": 3.0}) == before


@pytest.mark.parametrize("states", [0, 5])
def test_more_states_than_kernels_have_room_for_are_an_error(states: int) -> None:
    """The fifth would be read behind the row of the table that the kernels are given."""
    with pytest.raises(ValueError, match=f"kernel many has {states} states, .* take 1 to 4"):
        KernelForm("many", states, (), dict)
