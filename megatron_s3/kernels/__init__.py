"""Update rules applied to lists of parameters: a float64 reference and the paths tested against it.

``reference`` is the paper line by line; ``portable`` runs a rule with torch operations on any
device; ``cpu`` and ``gpu`` are fused kernels of the rules that carry a ``KernelForm``
(:mod:`megatron_s3.rules.kernel_form`): modules whose ``step`` takes what the portable one does, and
whose ``reason`` says why it cannot, or None.
"""
