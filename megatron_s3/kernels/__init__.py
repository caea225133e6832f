"""Kernels that apply an update rule to a list of parameters.

``portable`` is the PyTorch implementation, which runs any rule on any device.  ``cpu`` and ``gpu``
are fused kernels for the rules that carry a ``KernelForm`` (:mod:`megatron_s3.rules.kernel_form`).
Each is a module with a function ``step``, which has the same arguments in all of them.  A fused
kernel also has ``reason``, which returns why it cannot take a step, or None.
"""
