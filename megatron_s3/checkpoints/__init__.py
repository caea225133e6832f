"""Conversion of checkpoints to another optimizer or a Hugging Face model, and its evaluation.

``convert`` rewrites a checkpoint for another optimizer, by the rule in ``transfer``.  ``export``
writes a Hugging Face model and compares its logits; ``gpt2`` decides which models are GPT-2 and
renames their tensors.  ``evaluate`` runs lm-evaluation-harness on the paper's five tasks, which
``tasks`` defines, and makes the table of Figure 6.
"""
