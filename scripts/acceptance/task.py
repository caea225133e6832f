"""The task of a section."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """A section's share of the work.

    Attributes:
        device: "cuda" or "cpu".
        folder: where it writes logs and pictures; those of other sections lie beside it.
        seconds: until it is ended.
        part: which of ``parts`` equal parts of the section this process is, from 0.
        parts: number of processes of the section.
    """

    device: str
    folder: Path
    seconds: float = 600
    part: int = 0
    parts: int = 1

    @property
    def shards(self) -> Path:
        """Returns the file that keeps the shards that Megatron was asked for."""
        return self.folder.parent / "shards.json"

    @property
    def data(self) -> Path:
        """Returns the prefix of the dataset of the training."""
        return self.folder.parent / "data" / "std"
