"""Start of a job from a YAML file: checks, torchrun, SLURM, provenance and plans.

Only :mod:`megatron_s3.mcore` imports Megatron, and only when it is needed: configurations can be
read and jobs submitted on machines without torch and Megatron.
"""
