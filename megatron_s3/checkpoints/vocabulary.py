"""The vocabulary of a Hugging Face tokenizer."""

from pathlib import Path

__all__ = ["rows"]


def rows(folder: str | Path) -> int:
    """Returns the rows that a tokenizer's embedding needs: one more than its largest token ID.

    They may be more than its tokens, because IDs may be left out.

    Raises:
        Exception: transformers cannot read a tokenizer from the folder.
    """
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return 1 + max(read.get_vocab().values())
