"""Telemetry of a training run; nothing here depends on Megatron."""
