"""All contact with Megatron-LM.

``seams`` lists every function and class of Megatron that is wrapped or replaced (``seam`` checks
each), and ``registration`` installs the changes. The other modules hold the wrappers:

- ``rebinding``: modules that hold a wrapped object; ``configuration``: the fields of Megatron's
  OptimizerConfig.
- ``arguments``: flags, their validation, and the code that reads them.
- ``build``: the optimizer for the trainer, made of counted parts (``coverage``), with settings for
  single parameters (``overrides``); ``muon``: one for what Megatron's Muon leaves; ``chained``
  steps them, ``announcement`` logs what was built, and ``state`` holds the state of a training.
- ``distributed``, ``megatron_fsdp``, ``torch_fsdp2``: sharded state; ``one_pass``: the step without
  copies.
- ``checkpoint``: saving and loading; ``torch_adamw``: a repair of Megatron with torch's AdamW.
- ``telemetry`` with ``metrics_log`` and ``update_log``: logs; ``run_metrics``: the same logs for
  programs without Megatron's trainer.
- ``planning``: jobs that are not running.
- ``gpt`` and ``datasets``: Megatron's GPT and its indexed datasets, for other modules.
- ``cpu_device``: training without a GPU; ``output``: Megatron's output; ``refusal``: errors that
  end a run in one line; ``all_ranks``: errors that are raised on all ranks.
- ``compat_*``: work-arounds for old releases, and when each can be deleted.
"""
