"""Conversion of checkpoints to another optimizer or to a Hugging Face model, and its accuracy.

``gpt2`` says which models are GPT-2 and renames their tensors, ``export`` writes and checks the
Hugging Face folder, ``tasks`` knows the paper's five tasks and their data, ``evaluate`` runs
lm-evaluation-harness on them and makes the table of Figure 6.  ``transfer`` is the rule by which
AdamW's state becomes S3's and back, ``convert`` rewrites a checkpoint by it.
"""
