"""What is watched while a model trains; nothing here knows Megatron."""
