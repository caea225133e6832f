"""Kinds of a transformer's parameters, and one layout of all of them for all ranks."""

import re
from dataclasses import dataclass

__all__ = ["KINDS", "Layout", "kind_of"]

#: Kinds of parameters, by the names that megatron-core gives them; the first match counts.
_PATTERNS = (
    ("position", r"position_embeddings"),
    ("embedding", r"(^|\.)embedding\."),
    ("norm", r"layer_?norm|(^|\.)norm\b|_norm\b"),
    ("bias", r"bias\d*$"),
    ("experts", r"\.experts\."),
    ("router", r"\.router\."),
    ("attention.qkv", r"attention\.linear_(qkv|q|kv)"),
    ("attention.proj", r"attention\.linear_proj"),
    ("attention.other", r"attention\."),
    ("mlp.fc1", r"\.linear_fc1"),
    ("mlp.fc2", r"\.linear_fc2"),
    ("output", r"output_layer"),
    ("other", r""),
)
KINDS = tuple(kind for kind, _ in _PATTERNS)


def kind_of(name: str) -> str:
    """Returns one of :data:`KINDS`, from a parameter's name in its model."""
    return next(kind for kind, pattern in _PATTERNS if re.search(pattern, name))


@dataclass(frozen=True)
class Layout:
    """A row for each kind in each layer and outside of layers; the same on every rank.

    Attributes:
        layers: how many the whole model has.
    """

    layers: int

    @property
    def rows(self) -> int:
        """How many, the last one for what is counted by another rank."""
        return len(KINDS) * (self.layers + 1) + 1

    @property
    def uncounted(self) -> int:
        """The last row."""
        return self.rows - 1

    def row(self, name: str, layer: int | None) -> int:
        """Returns the row of a parameter.

        Args:
            name: in its model.
            layer: in the whole model, counted from 0; None for what is in no layer.
        """
        place = self.layers if layer is None or layer >= self.layers else layer
        return KINDS.index(kind_of(name)) * (self.layers + 1) + place

    def kinds(self) -> dict[str, list[int]]:
        """Returns the rows of each kind."""
        width = self.layers + 1
        return {k: list(range(i * width, (i + 1) * width)) for i, k in enumerate(KINDS)}

    def by_layer(self) -> dict[str, list[int]]:
        """Returns the rows of each layer, by its number from 0."""
        width = self.layers + 1
        return {str(n): list(range(n, self.uncounted, width)) for n in range(self.layers)}
