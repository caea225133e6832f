"""Update rules applied to lists of parameters: a float64 reference and the paths tested against it.

``reference`` is the paper line by line; ``portable`` runs a rule with torch operations on any
device; ``cpu`` and ``gpu`` are fused kernels, a module of the same two functions each, ``reason``
(why it cannot take these operands, or None) and ``step``.
"""
