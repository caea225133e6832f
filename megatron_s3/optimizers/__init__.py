"""The optimizers of the plugin.  To add one: a rule, a class with its description, a line here."""

from megatron_s3.optimizers.adamw import AdamW
from megatron_s3.optimizers.adan import Adan
from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.lion import Lion
from megatron_s3.optimizers.nadam import NAdam
from megatron_s3.optimizers.s3 import S3
from megatron_s3.optimizers.sgdm import SGDM
from megatron_s3.optimizers.sign_sgd import SignSGD

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
]

#: Optimizers by the name that ``--optimizer`` takes.
OPTIMIZERS: dict[str, type[ElementwiseOptimizer]] = {
    cls.description.name: cls for cls in (S3, AdamW, NAdam, Adan, Lion, SGDM, SignSGD)
}
