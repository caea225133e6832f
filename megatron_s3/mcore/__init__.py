"""All contact with Megatron-LM.

``seams`` lists everything of Megatron's that is wrapped or replaced (``seam``: how each is
checked), and ``registration`` installs it.  The other modules hold the wrappers and what they need:

- ``rebinding``: modules that hold what was wrapped; ``configuration``: the fields of Megatron's
  OptimizerConfig.
- ``arguments``: flags, their validation, and who reads them.
- ``build``: the optimizer that the trainer gets, of parts that are counted (``coverage``), with
  what is asked of single parameters (``overrides``); ``chained`` steps them, ``announcement`` says
  what was built, ``state`` holds what is kept of the training.
- ``distributed``, ``megatron_fsdp``, ``torch_fsdp2``: where state is sharded; ``one_pass``: the
  step without copies.
- ``checkpoint``: what is saved and what is loaded; ``torch_adamw``: a repair of upstream's own.
- ``telemetry`` with ``metrics_log`` and ``update_log``: what is logged.
- ``planning``: jobs that are not running.
- ``gpt`` and ``datasets``: a model of Megatron's and its files of tokens, for who needs them.
- ``cpu_device``: training without a GPU; ``output``, ``refusal``, ``all_ranks``: what is said,
  what ends a run in one line, and what all ranks do alike.
- ``compat_*``: work-arounds for old releases, and when each may be deleted.
"""
