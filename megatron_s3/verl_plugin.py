"""verl's entry point: importing it starts :mod:`megatron_s3.autoregister`, if MEGATRON_S3=1."""

from megatron_s3 import autoregister

autoregister.start()
