"""S3 in Megatron-Bridge, by Bridge's own extension points; nothing of Megatron's is wrapped.

Bridge asks an optimizer configuration that has a method ``provide`` for its optimizer
(``configuration``).  ``recipes`` makes such configurations and turns a recipe's Adam into S3, and
``callback`` logs updates, losses and spikes.  Importing this package imports Bridge, which needs a
GPU or ``megatron_s3.register(device="cpu")`` before it.
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
