"""What becomes of a checkpoint: a Hugging Face model, and its accuracy on the paper's tasks.

``gpt2`` says which models are GPT-2 and renames their tensors, ``export`` writes and checks the
Hugging Face folder, ``tasks`` knows the paper's five tasks and their data, ``evaluate`` runs
lm-evaluation-harness on them and makes the table of Figure 6.
"""
