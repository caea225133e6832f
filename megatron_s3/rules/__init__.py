"""Update rules as functions of tensors, one file for each optimizer.

A rule takes a gradient and the state tensors of the same shape, updates the state in place and
returns the update ``u``; the caller applies ``x <- (1 - lr * weight_decay) * x - lr * u``.  Rules
do not depend on parameters, param groups, kernels or Megatron.
"""

from megatron_s3.rules.adamw import adamw_update
from megatron_s3.rules.adan import adan_update
from megatron_s3.rules.lion import lion_update
from megatron_s3.rules.nadam import nadam_update
from megatron_s3.rules.s3 import s3_update
from megatron_s3.rules.sgdm import sgdm_update
from megatron_s3.rules.signsgd import signsgd_update

__all__ = ["RULES"]

#: The rules of the plugin's optimizers.
RULES = (
    s3_update,
    adamw_update,
    nadam_update,
    adan_update,
    lion_update,
    sgdm_update,
    signsgd_update,
)
