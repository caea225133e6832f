"""S3 in Megatron-Bridge.  The package uses Bridge's extension points and patches nothing.

If an optimizer configuration has a method ``provide``, Bridge calls it to build the optimizer
(``configuration``).  ``recipes`` makes such configurations, and turns a recipe with Adam into one
with S3.  ``callback`` logs updates, losses and spikes.  Importing this package imports Bridge,
which needs a GPU, or a call of ``megatron_s3.register(device="cpu")`` before the import.
"""

from megatron_s3.bridge.callback import MetricsCallback
from megatron_s3.bridge.configuration import S3OptimizerConfig
from megatron_s3.bridge.recipes import distributed_s3_with_cosine_annealing, use_s3

__all__ = [
    "MetricsCallback",
    "S3OptimizerConfig",
    "distributed_s3_with_cosine_annealing",
    "use_s3",
]
