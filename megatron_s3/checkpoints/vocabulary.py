"""The vocabulary of a Hugging Face tokenizer."""

from pathlib import Path

__all__ = ["rows"]


def rows(folder: str | Path) -> int:
    """Returns the rows that a tokenizer's embedding needs: its largest token and one.

    That may be more than its number of tokens, because numbers may be left out.

    Raises:
        Exception: transformers cannot read a tokenizer from the folder.
    """
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return 1 + max(read.get_vocab().values())
