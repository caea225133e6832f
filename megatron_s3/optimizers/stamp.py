"""Optimizer metadata in a saved state, and the check whether another optimizer can use it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_s3.optimizers.description import Description

__all__ = ["Stamp", "settings"]


@dataclass(frozen=True)
class Stamp:
    """The optimizer metadata of a saved state, or of an optimizer that loads one.

    Attributes:
        algorithm: the optimizer's name.
        format: the format of the saved state; for an optimizer that loads, the newest it knows.
        settings: the values of the hyperparameters that fix the meaning of the state.
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
        """Raises ValueError unless this optimizer can use a saved state.

        Args:
            saved: the metadata of the saved state.
            source: where the state was read from, for the message.
            called: returns the text of a value of ``optimizer`` or of a hyperparameter.
            advice: what to do instead of resuming, for the message.
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
        values: the hyperparameters; one that is not in it has its default.
    """
    fixing = (h for h in description.hyperparameters if h.fixes_state)
    return {h.name: values.get(h.name, h.default) for h in fixing}
