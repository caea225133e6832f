"""What becomes of a checkpoint: a Hugging Face model, and its accuracy on the paper's tasks.

``gpt2`` says which models are GPT-2 and renames their tensors, ``export`` writes and checks the
Hugging Face folder, ``tasks`` runs lm-evaluation-harness, ``evaluate`` makes the table of Figure 6.
"""
