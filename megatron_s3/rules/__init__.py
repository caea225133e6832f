"""Update rules as functions of tensors alone, one file an optimizer.

A rule takes a gradient and the state tensors of the same shape, advances the state in place and
returns the update ``u``; the caller applies ``x <- (1 - lr * weight_decay) * x - lr * u``.  Rules
know nothing of parameters, groups, devices' kernels or Megatron.
"""
