"""Hyperparameters that depend on one another."""

from typing import Any

__all__ = ["NEEDED"]

#: By hyperparameter, those without which it is refused.
NEEDED: dict[str, dict[str, Any]] = {"cautious_steps": {"cautious": True}}
