"""Megatron's trainer with states that the plugin does not have: `--states two-bytes|torchao`.

``two-bytes`` is S3 whose states have 16 bits an element together: 7 bits for ``exp_avg`` as a
fraction of ``exp_pnorm``, and 9 bits for the binary logarithm of ``exp_pnorm``, 8 codes an octave,
both rounded stochastically.  The states are float32 tensors that hold only such numbers.
``torchao`` is
Megatron's AdamW with torchao's 8-bit states (AdamW8bit), which must be installed.
"""

import runpy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_s3 import S3
from megatron_s3.launch import lock
from megatron_s3.rules.s3 import s3_update
from scripts.experiments.trainer import taken

__all__ = ["two_bytes"]

_LARGEST = 63  # of a fraction, 7 bits with its sign
_OCTAVE = 8  # codes
_RANGE = (-50 * _OCTAVE + 2, 14 * _OCTAVE)  # of 512 codes one is for 0 and one for NaN
_noise = torch.Generator().manual_seed(0)


def two_bytes(grad: Tensor, exp_avg: Tensor, exp_pnorm: Tensor, **hyperparameters: Any) -> Tensor:
    """S3's rule, with states rounded as two bytes hold them; arguments as for ``s3_update``."""
    update = s3_update(grad, exp_avg, exp_pnorm, **hyperparameters)
    codes = exp_pnorm.log2().mul_(_OCTAVE).add_(_uniform(exp_pnorm)).floor_().clamp_(*_RANGE)
    stored = torch.where(exp_pnorm == 0, 0.0, codes.div_(_OCTAVE).exp2_())
    exp_pnorm.copy_(torch.where(exp_pnorm.isnan(), exp_pnorm, stored))
    fractions = (exp_avg / exp_pnorm).clamp_(-1, 1).mul_(_LARGEST).add_(_uniform(exp_avg)).floor_()
    fractions = fractions.clamp_(max=_LARGEST).div_(_LARGEST).mul_(exp_pnorm)
    exp_avg.copy_(torch.where(exp_pnorm == 0, 0.0, fractions))
    return update


def _uniform(like: Tensor) -> Tensor:
    return torch.rand(like.shape, generator=_noise)


def _adamw_of_torchao(params: Any, **options: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    class AdamW(AdamW8bit):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:  # Megatron's scheduler sets a number
                group["lr"] = torch.as_tensor(group["lr"])
            return super().step(closure)

    known = ("lr", "betas", "eps", "weight_decay")
    return AdamW(params, **{name: options[name] for name in known if name in options})


if __name__ == "__main__":
    lock.join()
    if taken("--states", "") == "torchao":
        torch.optim.AdamW = _adamw_of_torchao  # type: ignore[assignment, misc]
    else:
        S3.description = replace(S3.description, rule=two_bytes)
    runpy.run_module("scripts.experiments.trainer", run_name="__main__", alter_sys=True)
