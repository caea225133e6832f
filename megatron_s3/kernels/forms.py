"""The rules that the fused kernels have, and what a kernel is given of each.

The kernels' sources have one function a rule, named as its form: :file:`cpu.cpp` and
:mod:`megatron_s3.kernels.gpu_rules`.  Numbers that a rule derives from its hyperparameters are
derived here in the same way, in double precision: a kernel gets them rounded to float32, as torch
rounds the numbers of a rule's operations.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_s3.rules.adamw import adamw_update
from megatron_s3.rules.adan import adan_update
from megatron_s3.rules.lion import lion_update
from megatron_s3.rules.nadam import nadam_update
from megatron_s3.rules.s3 import s3_bound, s3_update
from megatron_s3.rules.sgd import sgd_update
from megatron_s3.rules.sign_sgd import sign_sgd_update

__all__ = ["Form", "form", "names"]


@dataclass(frozen=True, slots=True)
class Form:
    """A rule with its hyperparameters, as a kernel takes it.

    Attributes:
        name: of the rule's function in the kernels' sources.
        states: how many state tensors it has.
        scalars: float32 numbers, in the order in which that function takes them.
        variant: which of the rule's variants is compiled in; its bits are the rule's own.
        general: set where the variant has no exact sequence of single operations, so that not
            every kernel has it: what the exact ones are, and that this is none.
    """

    name: str
    states: int
    scalars: tuple[float, ...]
    variant: int = 0
    general: str | None = None


def form(rule: Callable[..., object], hyperparameters: Mapping[str, object]) -> Form | None:
    """What a kernel is given of a rule; None of a rule that no kernel has.

    Args:
        rule: see :mod:`megatron_s3.rules`.
        hyperparameters: the rule's keyword arguments.
    """
    make = _FORMS.get(rule)
    return None if make is None else make(**hyperparameters)


def names(rule: Callable[..., object]) -> str:
    """What a message calls a rule."""
    return getattr(rule, "__name__", repr(rule))


def _coefficients(*betas: float) -> tuple[float, ...]:
    return tuple(number for beta in betas for number in (beta, 1 - beta))


def _s3(
    *,
    beta: float,
    p: float,
    beta2: float | None = None,
    nesterov: bool = True,
    correction: float = 1.0,
    grad_bound: float | None = None,
) -> Form:
    beta_s = beta if beta2 is None else beta2
    exact, bounded = p in (1, 2, 3), grad_bound is not None
    bound = s3_bound(beta, p, beta2, correction)
    return Form(
        "s3",
        2,
        (*_coefficients(beta, beta_s), correction, bound, p, grad_bound if bounded else 0.0),
        (int(p) if exact else 0) | nesterov << 2 | (beta_s == 0) << 3 | bounded << 4,
        None if exact else f"p = 1, 2 and 3, not {p:g}",
    )


def _adamw(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
    clip_update: float | None = None,
) -> Form:
    bound = math.inf if clip_update is None else clip_update
    factors = (1 / correction1, 1 / correction2**0.5)
    return Form("adamw", 2, (*_coefficients(beta1, beta2), eps, *factors, bound))


def _nadam(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_grad: float,
    weight_avg: float,
    correction2: float,
) -> Form:
    factors = (weight_grad, weight_avg, 1 / correction2)
    return Form("nadam", 2, (*_coefficients(beta1, beta2), eps, *factors))


def _adan(
    *,
    beta1: float,
    beta2: float,
    beta3: float,
    eps: float,
    first: bool,
    correction1: float,
    correction2: float,
    correction3: float,
) -> Form:
    factors = (1 / correction1, beta2 / correction2, 1 / correction3**0.5)
    return Form("adan", 4, (*_coefficients(beta1, beta2, beta3), eps, float(first), *factors))


def _lion(*, beta1: float, beta2: float) -> Form:
    return Form("lion", 1, _coefficients(beta1, beta2))


def _sgdm(*, momentum: float, nesterov: bool) -> Form:
    return Form("sgdm", 1, (momentum,), int(nesterov))


def _sign_sgd(*, momentum: float) -> Form:
    return Form("sign_sgd", 1, _coefficients(momentum))


_FORMS: dict[Callable[..., object], Callable[..., Form]] = {
    s3_update: _s3,
    adamw_update: _adamw,
    nadam_update: _nadam,
    adan_update: _adan,
    lion_update: _lion,
    sgd_update: _sgdm,
    sign_sgd_update: _sign_sgd,
}
