"""Telemetry of a training; nothing here knows Megatron."""
