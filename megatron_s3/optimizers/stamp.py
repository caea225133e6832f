"""Whose state it is that was saved, and whether it means something to another optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_s3.optimizers.description import Description

__all__ = ["Stamp", "settings"]


@dataclass(frozen=True)
class Stamp:
    """The stamp that says whether a state continues.

    Attributes:
        algorithm: the optimizer's name.
        format: of what is saved; the newest that is known, for an optimizer that loads.
        settings: values of the hyperparameters that fix the meaning of the state.
    """

    algorithm: str
    format: int
    settings: Mapping[str, Any]

    def check(
        self,
        saved: "Stamp",
        *,
        source: str = "the state to load",
        called: Callable[[str, Any], str],
        advice: str = "load the model's weights alone",
    ) -> None:
        """Raises ValueError unless a saved state means something to the optimizer of this stamp.

        Args:
            saved: of the state.
            source: what it was read from, for the message.
            called: how a message calls the value of ``optimizer`` or of a hyperparameter.
            advice: what to do instead of resuming.
        """
        if saved.algorithm != self.algorithm:
            then, now = (called("optimizer", s.algorithm) for s in (saved, self))
            raise ValueError(
                f"{source} was saved by {then}, whose state means nothing to {now}. Nothing was "
                f"loaded. Resume with {then}, or {advice}."
            )
        if saved.format > self.format:
            raise ValueError(
                f"{source} was saved by a newer megatron_s3, in format {saved.format}: this one "
                f"knows formats up to {self.format}. Nothing was loaded. Update megatron_s3, or "
                f"{advice}."
            )
        for name, value in self.settings.items():
            if saved.settings[name] != value:
                then, now = called(name, saved.settings[name]), called(name, value)
                raise ValueError(
                    f"{source} was saved with {then}; its state means nothing with {now}. Nothing "
                    f"was loaded. Resume with {then}, or {advice}."
                )


def settings(description: Description, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the hyperparameters that fix the meaning of a state, by name.

    Args:
        description: the optimizer's.
        values: of hyperparameters; what is not in it has its default.
    """
    fixing = (h for h in description.hyperparameters if h.fixes_state)
    return {h.name: values.get(h.name, h.default) for h in fixing}
