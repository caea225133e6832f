"""The optimizers of the plugin.  A new one needs an update rule and a registered class."""

from megatron_s3.optimizers.adamw import AdamW
from megatron_s3.optimizers.adan import Adan
from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.lion import Lion
from megatron_s3.optimizers.nadam import NAdam
from megatron_s3.optimizers.registry import OPTIMIZERS, register
from megatron_s3.optimizers.s3 import S3
from megatron_s3.optimizers.sgdm import SGDM
from megatron_s3.optimizers.signsgd import SignSGD

__all__ = [
    "OPTIMIZERS",
    "S3",
    "SGDM",
    "AdamW",
    "Adan",
    "ElementwiseOptimizer",
    "Lion",
    "NAdam",
    "SignSGD",
    "register",
]

for _cls in (S3, AdamW, NAdam, Adan, Lion, SGDM, SignSGD):
    register(_cls)
