"""Acceptance of a machine with GPUs: its fitness, and S3's results and speed there.

``scripts/gpu_acceptance.sh`` runs it.  Each section is a process of its own with a time limit
(:mod:`~scripts.acceptance.runner`), so that a crash, a hang or a CUDA error ends nothing but
its section; what a section had found by then is kept.
"""
