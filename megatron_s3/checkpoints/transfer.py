"""What becomes of AdamW's state, arguments and rates under S3, and of S3's under AdamW.

AdamW's averages begin at 0, and after t steps are too small by ``1 - beta**t``, which its update
makes up for; S3's update does not.  So the state is handed over without that bias, and takes it on
again on the way back:

========  =================================  ==================================
          to S3                              to AdamW
========  =================================  ==================================
m         ``exp_avg / (1 - beta1**t)``       ``exp_avg * (1 - beta1**t)``
r or v    ``sqrt(exp_avg_sq / (1-beta2**t))``  ``exp_pnorm**2 * (1 - beta2**t)``
========  =================================  ==================================

Both denominators are then what they divide by at this moment, root mean square and p-norm of recent
gradients, of one unit and one scale.  They are not equal (of normally distributed gradients the
3-norm is 1.17 times the 2-norm); S3's average, which remembers 1/(1-beta) = 20 steps, forgets the
difference within about 60.  ``|m| <= r``, which holds of S3's own state, need not hold of AdamW's;
S3's update is clamped at its bound, so that no element moves by more than lr all the same.

lr * weight_decay stays as it was.  The learning rate is multiplied by 3 on the way to S3: that goes
well in mid-run (README).  The paper's 10 is between a run of AdamW's and one of S3's, each from its
beginning, and is what S3's is divided by on the way to AdamW.
"""

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from megatron_s3.optimizers import S3, AdamW
from megatron_s3.optimizers.description import FORMAT

__all__ = [
    "LR_FACTOR",
    "OTHER_NAME",
    "Settings",
    "TransferError",
    "arguments",
    "changes",
    "convert_object",
    "convert_tensor",
    "over",
    "rename",
    "scaled",
    "settings",
    "state_of",
]

#: S3's learning rate over AdamW's, by the target.
LR_FACTOR = {"s3": 3.0, "adam": 10.0}

#: The state that has another name under the target.
OTHER_NAME = {"s3": ("exp_avg_sq", "exp_pnorm"), "adam": ("exp_pnorm", "exp_avg_sq")}

#: What AdamW of torch, of Transformer Engine and of the plugin keeps in its groups for itself.
_ADAMS = {
    "amsgrad",
    "beta1",
    "beta2",
    "betas",
    "bias_correction",
    "capturable",
    "clip_update",
    "decoupled_weight_decay",
    "differentiable",
    "eps",
    "foreach",
    "fused",
    "maximize",
}
#: And what torch's needs to find there when it resumes, beside betas and eps.
_TORCH_ADAMW = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
    "bias_correction": True,  # Transformer Engine's
}
_RATES = ("lr", "min_lr", "max_lr", "decoupled_lr", "decoupled_min_lr", "lr_warmup_init")
_SCHEDULER_RATES = ("max_lr", "start_lr", "min_lr", "init_lr")
_DECAYS = ("weight_decay", "start_weight_decay", "end_weight_decay", "start_wd", "end_wd")

#: The state's place in the names of a ``torch_dist`` checkpoint: ``optimizer.state.exp_avg.WEIGHT``
#: where it can be resharded, ``optimizer.distributed....bucket_idx_0.exp_avg`` where it cannot.
_STATE = re.compile(
    r"^((?:chained_\d+\.)?optimizer\.(?:state\.|.*\.bucket_idx_\d+\.))"
    r"(param|fp32_param|exp_avg_sq|exp_avg|exp_pnorm|master_param)(?=\.|$)"
)


class TransferError(ValueError):
    """The state or the arguments cannot be handed over; the message says why, and what to do."""


@dataclass(frozen=True)
class Settings:
    """One conversion.

    Attributes:
        to: ``s3`` or ``adam``.
        step: updates that the state has seen.
        beta1: AdamW's coefficient of ``exp_avg``.
        beta2: AdamW's coefficient of ``exp_avg_sq``.
        eps: AdamW's.
        lr_factor: S3's learning rates over AdamW's; weight decays are AdamW's over S3's.
        s3: S3's hyperparameters.
        clip_grad: the target's.
        sharded: whether by the distributed optimizer.
    """

    to: str
    step: int
    beta1: float
    beta2: float
    eps: float
    lr_factor: float
    s3: dict[str, Any]
    clip_grad: float
    sharded: bool

    @property
    def corrections(self) -> tuple[float, float]:
        """``1 - beta**t`` of ``exp_avg`` and of ``exp_avg_sq``; 1 before the first update."""
        if not self.step:
            return 1.0, 1.0
        return 1 - self.beta1**self.step, 1 - self.beta2**self.step


def scaled(value: float, factor: float) -> float:
    """``value * factor`` as it is done on paper: 3e-4 * 10 is 3e-3, and not 2.9999999999999996e-3.

    Megatron compares the rates of a checkpoint with those of the flags exactly.
    """
    return _written(Decimal(repr(float(value))) * Decimal(repr(float(factor))))


def over(value: float, factor: float) -> float:
    """``value / factor``, as :func:`scaled`."""
    return _written(Decimal(repr(float(value))) / Decimal(repr(float(factor))))


def _written(value: Decimal) -> float:
    """A short number, if it is one but for a rounding: a third, times 3."""
    exact, short = float(value), float(f"{value:.14g}")
    return short if math.isclose(exact, short, rel_tol=4e-16) else exact


def state_of(name: str) -> str | None:
    """Which state a checkpoint's tensor is (``exp_avg``, ..., or ``param``); None for others."""
    found = _STATE.match(name)
    return found and found[2]


def rename(name: str, to: str) -> str:
    """The tensor's name under the target optimizer."""
    old, new = OTHER_NAME[to]
    return _STATE.sub(lambda m: m[1] + new, name) if state_of(name) == old else name


def changes(name: str, settings: Settings) -> bool:
    """Whether the tensor's values differ afterwards."""
    state = state_of(name)
    return state == OTHER_NAME[settings.to][0] or (
        state == "exp_avg" and settings.corrections[0] != 1
    )


def convert_tensor(name: str, tensor: Tensor, settings: Settings) -> Tensor:
    """The state's values under the target, in the dtype they have; ``tensor`` may be overwritten.

    Negative squares, which memory between parameters may hold, become 0; NaN stays NaN.
    """
    one, two = settings.corrections
    values = tensor.detach().to(torch.float32)
    if state_of(name) == "exp_avg":
        values = values.div_(one) if settings.to == "s3" else values.mul_(one)
    elif settings.to == "s3":
        values = values.clamp_min_(0).div_(two).sqrt_()
    else:
        values = values.square_().mul_(two)
    return values.to(tensor.dtype)


def settings(
    objects: list[Any],
    to: str,
    lr_factor: float | None = None,
    s3: dict[str, Any] | None = None,
) -> Settings:
    """What the objects of a checkpoint (param groups, arguments) say about the conversion.

    Args:
        objects: as the checkpoint holds them.
        to: the target.
        lr_factor: S3's learning rate over AdamW's; :data:`LR_FACTOR` if None.
        s3: hyperparameters of S3, where they are not its defaults (to S3 alone).

    Raises:
        TransferError: they are no AdamW's, or S3's; they disagree about steps or betas.
        ValueError: a hyperparameter out of its range.
    """
    groups = [group for found in objects for group in _groups(found)]
    (args,) = [a for found in objects for a in arguments(found)][:1] or [None]
    if args is None:
        raise TransferError("it holds no arguments of the run: Megatron's trainer saves them")
    written = getattr(args, "optimizer", "adam")
    if getattr(args, "no_save_optim", False) or not groups:
        raise TransferError(
            "it holds no optimizer's state (--no-save-optim): its weights load into any optimizer "
            "as they are, with --no-load-optim"
        )
    stamps = {group.get("algorithm", "adam") for group in groups}
    target = "s3" if to == "s3" else "adam"
    if written == target or target in stamps:
        raise TransferError(f"it is --optimizer {target}'s already: it resumes as it is")
    allowed = ("adam", AdamW.description.name) if to == "s3" else ("s3",)
    if written not in allowed or not stamps <= set(allowed):
        raise TransferError(
            f"it was saved by --optimizer {written}, whose state is neither AdamW's nor S3's. Load "
            "its weights alone, with --no-load-optim"
        )
    if any(group.get("decoupled_weight_decay") is False for group in groups):
        raise TransferError(
            "its optimizer is Adam with weight decay in the gradient, not AdamW: nothing of S3's "
            "continues that. Load its weights alone, with --no-load-optim"
        )
    steps = {int(step) for found in objects for step in _steps(found)}
    if len(steps) != 1:
        raise TransferError(f"its param groups have no one number of steps, but {sorted(steps)}")
    betas = {_betas(group) for group in groups if _betas(group)}
    if len(betas) > 1:
        raise TransferError(f"its param groups have different betas: {sorted(betas)}")
    beta1, beta2 = betas.pop() if betas else (args.adam_beta1, args.adam_beta2)
    values = {h.name: h.default for h in S3.description.hyperparameters} | (s3 or {})
    for h in S3.description.hyperparameters:
        h.check(values[h.name], f"--s3-{h.name}".replace("_", "-"))
    return Settings(
        to=to,
        step=steps.pop(),
        beta1=beta1,
        beta2=beta2,
        eps=args.adam_eps,
        lr_factor=LR_FACTOR[to] if lr_factor is None else lr_factor,
        s3=values,
        clip_grad=S3.description.clip_grad if to == "s3" else AdamW.description.clip_grad,
        sharded=args.use_distributed_optimizer,
    )


def convert_object(value: Any, settings: Settings) -> Any:
    """An object of the checkpoint under the target: arguments, schedule, param groups; a copy.

    What is none of these is handed on as it is.
    """
    if isinstance(value, argparse.Namespace):
        return _convert_arguments(value, settings)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(convert_object(each, settings) for each in value)
    if type(value) is not dict:
        return value
    new = {}
    for name, each in value.items():
        if name == "param_groups":
            new[name] = [_convert_group(group, settings) for group in each]
        elif name == "opt_param_scheduler" and isinstance(each, dict):
            new[name] = _with_rates(each, _SCHEDULER_RATES, settings)
        elif name in ("rng_state", "rerun_state_machine"):
            new[name] = each
        else:
            new[name] = convert_object(each, settings)
    if "param_groups" in new:
        # Beside the groups, Megatron keeps torch AdamW's step where the state is not sharded.
        state = {k: v for k, v in new.get("state", {}).items() if k != "common_step"}
        if settings.to == "adam" and not settings.sharded:
            state["common_step"] = torch.tensor(float(settings.step))
        new.pop("state", None)
        if state:
            new["state"] = state
    return new


def _convert_arguments(args: argparse.Namespace, settings: Settings) -> argparse.Namespace:
    values = _with_rates(vars(args), _RATES, settings)
    values |= {"optimizer": settings.to, "clip_grad": settings.clip_grad}
    if settings.to == "s3":
        values |= {f"s3_{name}": value for name, value in settings.s3.items()}
        values |= {"s3_format": FORMAT}
    else:
        values |= {name: None for name in values if name in _S3_ARGUMENTS}
    return argparse.Namespace(**values)


_S3_ARGUMENTS = {f"s3_{h.name}" for h in S3.description.hyperparameters}


def _convert_group(group: dict[str, Any], settings: Settings) -> dict[str, Any]:
    own = {h.name for h in S3.description.hyperparameters} | {"algorithm", "format"}
    values = {k: v for k, v in group.items() if k not in _ADAMS | own}
    values = _with_rates(values, _RATES, settings)
    values["step"] = settings.step
    if settings.to == "s3":
        return values | settings.s3 | {"algorithm": "s3", "format": FORMAT}
    return values | _TORCH_ADAMW | {"betas": (settings.beta1, settings.beta2), "eps": settings.eps}


def _with_rates(values: dict, rates: tuple[str, ...], settings: Settings) -> dict:
    new = dict(values)
    higher, lower = (scaled, over) if settings.to == "s3" else (over, scaled)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name in rates:
            new[name] = higher(value, settings.lr_factor)
        elif name in _DECAYS:
            new[name] = lower(value, settings.lr_factor)
    return new


def _groups(value: Any) -> Iterator[dict]:
    """Every param group in an object."""
    if isinstance(value, dict):
        yield from value.get("param_groups", ())
        for each in value.values():
            yield from _groups(each)
    elif isinstance(value, list | tuple):
        for each in value:
            if isinstance(each, dict | list | tuple):
                yield from _groups(each)


def _steps(value: Any) -> Iterator[float]:
    for group in _groups(value):
        if group.get("step") is not None:
            yield float(group["step"])
    yield from _common_steps(value)


def _common_steps(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for name, each in value.items():
            if name == "common_step":
                yield float(each)
            else:
                yield from _common_steps(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _common_steps(each)


def arguments(value: Any) -> Iterator[argparse.Namespace]:
    """The arguments of the run in an object of the checkpoint, if it holds them."""
    if isinstance(value, dict) and isinstance(value.get("args"), argparse.Namespace):
        yield value["args"]
    elif isinstance(value, list | tuple):
        for each in value:
            yield from arguments(each)


def _betas(group: dict) -> tuple[float, float] | None:
    if "betas" in group:
        return tuple(group["betas"])
    return (group["beta1"], group["beta2"]) if "beta1" in group else None
