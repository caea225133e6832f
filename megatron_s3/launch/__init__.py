"""The way from a YAML file to a running job: checks, torchrun and SLURM, provenance, plans.

Megatron is reached only through :mod:`megatron_s3.mcore`, and only where it is needed: configs can
be read, and jobs submitted, where neither torch nor Megatron is installed.
"""
