"""Optimizer metadata in a saved state, and the check whether another optimizer can use it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_s3.optimizers.description import Description

__all__ = ["PATTERN", "Stamp", "check_parts", "settings"]

#: The key of a param group that holds the pattern of its parameters' names, if the group's states
#: have another meaning than those of the other parameters.
PATTERN = "pattern"

_ADVICE = "load the model's weights alone"


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
        advice: str = _ADVICE,
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


def check_parts(
    own: Iterable[Mapping[str, Any]],
    saved: Iterable[Mapping[str, Any]],
    *,
    source: str = "the state to load",
    advice: str = _ADVICE,
) -> None:
    """Raises ValueError if a model's parameters were given to optimizers in another way.

    Algorithms that are alone on both sides are not compared; :meth:`Stamp.check` does this.  A
    state of an older version has no patterns.

    Args:
        own: the param groups of the optimizer that loads the state.
        saved: the saved param groups.
        source: where the state was read from, for the message.
        advice: what to do instead of resuming, for the message.
    """
    now, then = _parts(own), _parts(saved)
    alone = [parts for parts in (now, then) if len(parts) == 1]
    unmarked = all(pattern is None for _, pattern in then)
    if now == then or (unmarked and len({name for name, _ in now | then}) == 1):
        return
    if len(alone) == 2 and unmarked and all(pattern is None for _, pattern in now):
        return
    raise ValueError(
        f"{source} was saved with {_called(then)}, and this run has {_called(now)}: the states of "
        "one optimizer mean nothing to another. Nothing was loaded. Resume with the same "
        f"optimizers for the same patterns, or {advice}."
    )


def _parts(groups: Iterable[Mapping[str, Any]]) -> dict[tuple[str | None, str | None], None]:
    parts = ((group.get("algorithm"), group.get(PATTERN)) for group in groups)
    return dict.fromkeys(sorted(parts, key=lambda part: (part[1] or "", part[0] or "")))


def _called(parts: Iterable[tuple[str | None, str | None]]) -> str:
    return " and ".join(
        (name or "another optimizer") + (f" for {pattern!r}" if pattern else "")
        for name, pattern in parts
    )


def settings(description: Description, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the hyperparameters that fix the meaning of a state, by name.

    Args:
        description: the optimizer's.
        values: the hyperparameters; one that is not in it has its default.
    """
    fixing = (h for h in description.hyperparameters if h.fixes_state)
    return {h.name: values.get(h.name, h.default) for h in fixing}
