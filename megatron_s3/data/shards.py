"""A part of the input."""

from dataclasses import dataclass

__all__ = ["Shard"]


@dataclass(frozen=True)
class Shard:
    """A part of the input, which one worker reads in order.

    Attributes:
        kind: `text` (each file is one document), `jsonl`, `parquet`, or `hub:` followed by the name
            of a reader of the `datasets` library.
        files: Paths, or the address of a file on the hub.
        identity: Size and modification time of each file, or its commit on the hub.
        start: The first byte (jsonl) or row group (parquet). A line belongs to the shard in which
            it begins.
        stop: The byte or row group after the last one.
        key: The key or column that holds the text.
        size: Number of bytes to read; 0 if unknown.
        before: Number of documents before it in the input; None if it is not known without reading.
    """

    kind: str
    files: tuple[str, ...]
    identity: tuple[str, ...]
    start: int = 0
    stop: int = 0
    key: str = ""
    size: int = 0
    before: int | None = None
