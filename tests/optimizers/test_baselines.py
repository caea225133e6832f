"""Each baseline against the well-kept implementation it agrees with, from identical state."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_s3.optimizers import OPTIMIZERS, SGDM, AdamW, Adan, Lion, NAdam, SignSGD, nadam

SHAPES = [(7, 5), (64,), (3, 3, 3)]


def params(seed: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
        for s in SHAPES
    ]


def run(
    optimizer: torch.optim.Optimizer, own: list[Tensor], steps: int, begin: int = 0
) -> list[Tensor]:
    for t in range(begin, begin + steps):
        for param, grad in zip(own, params(100 + t, own[0].dtype), strict=True):
            param.grad = grad.detach() * 10.0 ** (t % 3 - 1)
            param.grad.view(-1)[::5] = 0
        optimizer.step()
    return [param.detach() for param in own]


def adan(theirs: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import Adan as Theirs

    options["betas"] = (0.98, 0.92, 0.99)
    return Theirs(theirs, weight_decouple=True, foreach=False, max_grad_norm=0.0, **options)


def lion(theirs: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lion as Theirs

    return Theirs(theirs, betas=(0.95, 0.98), weight_decouple=True, **options)


def signum(theirs: list[Tensor], momentum: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import SignSGD as Theirs

    return Theirs(theirs, momentum=momentum, weight_decouple=True, **options)


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "adamw": (AdamW, lambda p, **o: torch.optim.AdamW(p, betas=(0.9, 0.95), **o)),
    "nadam": (
        NAdam,
        lambda p, **o: torch.optim.NAdam(p, betas=(0.9, 0.95), decoupled_weight_decay=True, **o),
    ),
    "adan": (Adan, adan),
    "lion": (Lion, lion),
    # torch's weight decay is L2: compared without.
    "sgdm": (SGDM, lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o | {"weight_decay": 0})),
    "sgdm-nesterov": (
        lambda p, **o: SGDM(p, nesterov=True, **o),
        lambda p, **o: torch.optim.SGD(p, momentum=0.9, nesterov=True, **o | {"weight_decay": 0}),
    ),
    "signsgd": (
        lambda p, **o: SignSGD(p, momentum=0.0, **o),
        lambda p, **o: signum(p, 0.0, **o),
    ),
    "signum": (lambda p, **o: SignSGD(p, momentum=0.9, **o), lambda p, **o: signum(p, 0.9, **o)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_agrees_with_the_well_kept_implementation(name: str, dtype: torch.dtype) -> None:
    """A few roundings a step, each of the size of x's or of lr times u's last place.

    Signs are of exactly equal or clearly different numbers, but for 0.
    """
    ours, theirs = PAIRS[name]
    options = {"lr": 0.01, "weight_decay": 0.0 if name.startswith("sgdm") else 0.1}
    one, two = params(0, dtype), params(0, dtype)
    a, b = run(ours(one, **options), one, 30), run(theirs(two, **options), two, 30)
    # torch.optim.NAdam keeps the product of its momentum's schedule in float32.
    eps = torch.finfo(torch.float32 if name == "nadam" else dtype).eps
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=60 * eps, atol=60 * eps)


def test_nadams_of_other_schedules_step_beside_one_another() -> None:
    """Bitwise as each alone: every pair of momentum and decay has a schedule of its own."""
    options = ({}, {"momentum_decay": 0.1}, {"beta1": 0.5})
    alone = [params(0, torch.float32) for _ in options]
    for some, other in zip(alone, options, strict=True):
        run(NAdam(some, lr=0.01, **other), some, 6)
    beside = [params(0, torch.float32) for _ in options]
    pairs = [(NAdam(own, lr=0.01, **o), own) for own, o in zip(beside, options, strict=True)]
    for t in range(6):
        for optimizer, own in pairs:
            run(optimizer, own, 1, t)
    for some, others in zip(alone, beside, strict=True):
        assert all(map(torch.equal, some, others))


def test_updates_are_clipped_element_by_element() -> None:
    """Exact: Figure 10's AdamW."""
    probe = torch.nn.Parameter(torch.zeros(1000))
    optimizer = AdamW([probe], lr=1.0, beta1=0.9, beta2=0.999, clip_update=1.0)
    free = torch.nn.Parameter(torch.zeros(1000))
    unclipped = AdamW([free], lr=1.0, beta1=0.9, beta2=0.999)
    largest = 0.0
    for t in range(600):
        grad = torch.randn(1000, generator=torch.Generator().manual_seed(t)) * (
            1e-3 if t < 45 else 1.0
        )
        for param, stepper in ((probe, optimizer), (free, unclipped)):
            torch.nn.init.zeros_(param)
            param.grad = grad
            stepper.step()
        largest = max(largest, free.abs().max().item())
        assert torch.equal(probe.detach(), free.detach().clamp(-1, 1))
    assert largest > 1.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumes_bitwise(name: str) -> None:
    """A state dict holds all there is to go on from, the step's schedules included."""
    cls = OPTIMIZERS[name]
    one = params(0, torch.float32)
    optimizer = cls(one, lr=0.01, weight_decay=0.1)
    run(optimizer, one, 5)
    two = [torch.nn.Parameter(p.detach().clone()) for p in one]
    again = cls(two, lr=0.5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's loading shares tensors
    for a, b in zip(run(optimizer, one, 5), run(again, two, 5), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_element_depends_on_that_element_alone(name: str) -> None:
    """Bitwise: cut anywhere, as shards are."""
    cls = OPTIMIZERS[name]
    whole = torch.nn.Parameter(torch.randn(1003, generator=torch.Generator().manual_seed(1)))
    cuts = [torch.nn.Parameter(t.clone()) for t in whole.detach().split([1, 15, 500, 487])]
    one, two = cls([whole], lr=0.01, weight_decay=0.1), cls(cuts, lr=0.01, weight_decay=0.1)
    for t in range(4):
        whole.grad = torch.randn(1003, generator=torch.Generator().manual_seed(t))
        for param, grad in zip(cuts, whole.grad.split([1, 15, 500, 487]), strict=True):
            param.grad = grad
        one.step()
        two.step()
    assert torch.equal(whole.detach(), torch.cat([c.detach() for c in cuts]))


def test_an_unknown_hyperparameter_is_refused() -> None:
    with pytest.raises(TypeError, match="AdamW has no hyperparameter beta; it has beta1, beta2"):
        AdamW(params(0, torch.float32), beta=0.9)


def test_nadam_remembers_few_schedules() -> None:
    """A beta1 that changes in each step, and the product of all steps each time."""
    optimizer = NAdam([torch.zeros(1)])
    for step in range(1, 200):
        group = {"beta1": 0.5 + step / 500, "beta2": 0.9, "eps": 0.0, "momentum_decay": 4e-3}
        values = optimizer.group_hyperparameters(group | {"step": step})
        fresh = NAdam([torch.zeros(1)]).group_hyperparameters(group | {"step": step})
        assert values == fresh
    assert len(vars(optimizer)["_known"]) <= 64


def test_nadam_multiplies_once_a_step_where_counts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """At step 1,000,000, each step would otherwise take a second."""
    some = params(0, torch.float32)
    optimizer = NAdam(some)
    run(optimizer, some, 1)
    saved = optimizer.state_dict()
    steps = [3000 - 500 * i for i in range(len(some))]
    saved["param_groups"][0] |= {"step": 3000, "steps": steps, "format": 2}
    optimizer.load_state_dict(saved)
    run(optimizer, some, 1)
    calls, mu = [], nadam._mu
    monkeypatch.setattr(nadam, "_mu", lambda *given: calls.append(given) or mu(*given))
    run(optimizer, some, 3, 1)
    assert len(calls) < 60
