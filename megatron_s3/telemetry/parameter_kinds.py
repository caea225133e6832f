"""Parameter types of a transformer, and the layout of their statistics, equal on all ranks."""

import re
from dataclasses import dataclass

__all__ = ["KINDS", "Layout", "kind_of"]

#: Parameter types with the pattern of megatron-core's parameter names; the first match counts.
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
    """Returns the type of a parameter, one of :data:`KINDS`, from its name in the model."""
    return next(kind for kind, pattern in _PATTERNS if re.search(pattern, name))


@dataclass(frozen=True)
class Layout:
    """A layout with one row for each parameter type in each layer and outside of the layers.

    It is the same on every rank.

    Attributes:
        layers: number of layers of the whole model.
    """

    layers: int

    @property
    def rows(self) -> int:
        """The number of rows; the last row holds parameters that another rank counts."""
        return len(KINDS) * (self.layers + 1) + 1

    @property
    def uncounted(self) -> int:
        """The index of the last row."""
        return self.rows - 1

    def row(self, name: str, layer: int | None) -> int:
        """Returns the row of a parameter.

        Args:
            name: the parameter's name in its model.
            layer: index of its layer in the whole model; None if it is in no layer.
        """
        place = self.layers if layer is None or layer >= self.layers else layer
        return KINDS.index(kind_of(name)) * (self.layers + 1) + place

    def kinds(self) -> dict[str, list[int]]:
        """Returns the rows of each parameter type."""
        width = self.layers + 1
        return {k: list(range(i * width, (i + 1) * width)) for i, k in enumerate(KINDS)}

    def by_layer(self) -> dict[str, list[int]]:
        """Returns the rows of each layer, by the layer's index."""
        width = self.layers + 1
        return {str(n): list(range(n, self.uncounted, width)) for n in range(self.layers)}
