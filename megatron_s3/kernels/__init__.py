"""Update rules applied to lists of parameters: a float64 reference and the paths tested against it.

``reference`` is the paper line by line; ``portable`` runs a rule with torch operations on any
device.
"""
