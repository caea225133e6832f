"""Megatron's checkpoints: complete saves, and checks before anything is loaded."""
