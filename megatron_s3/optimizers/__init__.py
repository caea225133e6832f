"""The optimizers of the plugin.  To add one: a rule, a class with its description, a line here."""

from megatron_s3.optimizers.base import ElementwiseOptimizer
from megatron_s3.optimizers.s3 import S3

__all__ = ["OPTIMIZERS", "S3", "ElementwiseOptimizer"]

#: Optimizers by the name that ``--optimizer`` takes.
OPTIMIZERS: dict[str, type[ElementwiseOptimizer]] = {cls.description.name: cls for cls in (S3,)}
