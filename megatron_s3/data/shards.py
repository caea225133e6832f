"""A part of the input, as one worker reads it."""

from dataclasses import dataclass

__all__ = ["Shard"]


@dataclass(frozen=True)
class Shard:
    """A part of the input: what one worker reads, in order.

    Attributes:
        kind: `text` (one document a file), `jsonl`, `parquet`, or `hub:` and a reader of the
            `datasets` library.
        files: Paths, or the address of a file on the hub.
        identity: What tells each file from a changed one.
        start: First byte (jsonl) or row group (parquet). A line belongs to the shard in which it
            begins.
        stop: One past the last.
        key: The key or column that holds the text.
        size: Bytes to read, 0 if unknown.
        before: Documents before it in the input, or None if that is not known without reading.
    """

    kind: str
    files: tuple[str, ...]
    identity: tuple[str, ...]
    start: int = 0
    stop: int = 0
    key: str = ""
    size: int = 0
    before: int | None = None
