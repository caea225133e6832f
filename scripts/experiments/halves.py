"""The validation documents of a dataset in two halves: one to choose by, one to report."""

import os
from pathlib import Path

from megatron_s3 import data
from megatron_s3.data import indexed

__all__ = ["arguments", "write"]

#: The even documents choose the learning rate, and the losses of the odd ones are reported.
HALVES = ("choice", "test")


def arguments(prefix: str) -> list[str]:
    """Returns Megatron's flags for a dataset, with other documents for testing than for validation.

    Raises:
        DataError: there is no complete dataset.
    """
    words = data.megatron_arguments(prefix)
    words[words.index("--valid-data-path") + 1] = f"{prefix}_{HALVES[0]}"
    return [*words, "--test-data-path", f"{prefix}_{HALVES[1]}"]


def write(prefix: str) -> None:
    """Writes the halves of the validation documents, unless they are there and up to date."""
    source = f"{prefix}_valid"
    made = [Path(f"{prefix}_{name}.idx") for name in HALVES]
    if all(
        idx.exists() and idx.stat().st_mtime_ns >= Path(f"{source}.idx").stat().st_mtime_ns
        for idx in made
    ):
        return
    described = data.load(prefix)
    assert described is not None
    documents = indexed.library().IndexedDataset(source)
    for half, idx in enumerate(made):
        path = str(idx.with_suffix(""))
        builder = indexed.builder(path, int(described["tokenizer"]["vocab_size"]))
        for index in range(half, len(documents), len(HALVES)):
            builder.add_document(documents[index], [len(documents[index])])
        builder.finalize(f"{path}.tmp")
        os.replace(f"{path}.tmp", idx)
