"""Megatron's own writer of indexed datasets, and checksums of the files that it wrote."""

import gc
import hashlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megatron_s3.data.errors import DataError

if TYPE_CHECKING:
    import numpy as np

_CHUNK = 1 << 20


def library() -> Any:
    """Returns Megatron's `indexed_dataset`, without its messages about GPU packages and ranks.

    Raises:
        DataError: If it cannot be imported.
    """
    try:
        from megatron_s3.mcore import datasets

        return datasets.indexed_dataset()
    except ImportError as error:
        raise DataError(
            f"megatron-core, which writes the dataset, cannot be imported ({error}): "
            "pip install 'megatron-s3[megatron]'"
        ) from error


def builder(path: str, vocab_size: int) -> Any:
    """Returns an `IndexedDatasetBuilder` of `path`.bin, with the smallest type for the tokens."""
    megatron = library()
    return megatron.IndexedDatasetBuilder(
        f"{path}.bin", dtype=megatron.DType.optimal_dtype(vocab_size)
    )


def join(path: str, pieces: Iterable[str], vocab_size: int) -> None:
    """Writes `path`.bin and `path`.idx, which hold the datasets `pieces` in order."""
    joined = builder(path, vocab_size)
    from megatron_s3.mcore.output import quiet

    # add_index() collects garbage each time, which takes long while torch's objects are tracked.
    gc.freeze()
    try:
        with quiet():
            for piece in pieces:
                joined.add_index(piece)
    finally:
        gc.unfreeze()
    joined.finalize(f"{path}.idx")


def sums(path: str, vocab_size: int) -> "tuple[dict[str, Any], np.ndarray]":
    """Returns sizes and SHA-256 of `path`.bin and `path`.idx, and how often each token occurs."""
    import numpy as np

    dtype = library().DType.optimal_dtype(vocab_size)
    counts = np.zeros(vocab_size, dtype=np.int64)
    found: dict[str, Any] = {}
    for ending in ("bin", "idx"):
        digest = hashlib.sha256()
        with open(f"{path}.{ending}", "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if ending == "bin":
                    counts += np.bincount(np.frombuffer(chunk, dtype=dtype), minlength=vocab_size)
        found[f"{ending}_size"] = os.path.getsize(f"{path}.{ending}")
        found[f"{ending}_sha256"] = digest.hexdigest()
    return found, counts
