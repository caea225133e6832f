"""All contact with Megatron-LM.

``seams`` lists every function of Megatron's that is wrapped; ``registration`` wraps them.  The
other modules hold the wrappers and what they need, by concern: ``arguments`` (flags), ``build``
(the optimizer that the trainer gets), ``distributed`` (sharded state), ``checkpoint`` (what may be
loaded into what), ``torch_adamw`` (a repair of upstream's own), ``update_log`` (the largest update,
to TensorBoard), ``cpu_device`` (training without a GPU), ``weights`` (a checkpoint's model, and
Megatron's own forward on it).  For jobs that are not running: ``parse`` (Megatron's parser and
validation), ``fake_world`` and ``sizes`` (what a rank will keep, from Megatron's own sharding).
"""
