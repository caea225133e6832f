"""Megatron's checkpoints: what is loaded into what, decided before anything is; whole saves."""
