"""Documents to tokens to Megatron's indexed datasets.

A token is a byte of UTF-8 text; `EOD` closes each document. There is no tokenizer to download, and
Megatron's loss is then in nats per byte. A dataset at `PREFIX` is five files::

    PREFIX_train.bin  PREFIX_train.idx  PREFIX_valid.bin  PREFIX_valid.idx  PREFIX.json

`PREFIX.json` describes the other four and is written last: where it stands, they are whole.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_s3.data.documents import DataError, Source

if TYPE_CHECKING:
    import numpy as np

#: End of document: the first number that is no byte.
EOD = 256
VOCAB_SIZE = 257
SPLITS = ("train", "valid")
_FORMAT = 1


def build(
    src: Source, prefix: str, split: tuple[int, int] = (95, 5)
) -> tuple[dict[str, Any], bool]:
    """Write the dataset, or find it already there.

    A dataset is reused if it was made from the same source with the same split, every document is
    still the same (by SHA-256) and its files have the sizes they were written with.

    Args:
        src: The documents. Read one at a time, never all at once.
        prefix: Path that all file names begin with; its directory is made.
        split: Parts of the documents for training and for validation.

    Returns:
        The description (the content of `PREFIX.json`) and whether the dataset was reused.

    Raises:
        DataError: If the source is unusable, or leaves one side of the split empty.
    """
    if min(split) < 1:
        raise DataError(f"--split {split[0]},{split[1]}: both parts must be at least 1")
    wanted = {"format": _FORMAT, "source": src.describe(), "split": list(split)}
    old = load(prefix)
    if old and all(old.get(k) == v for k, v in wanted.items()) and _same(old, prefix, src):
        return old, True
    return _write(src, prefix, split, wanted), False


def load(prefix: str) -> dict[str, Any] | None:
    """The description of the whole dataset at `prefix`, or None if there is none."""
    try:
        with open(f"{prefix}.json", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def unigram_entropy(counts: "np.ndarray", model: "np.ndarray") -> float:
    """Mean cost of tokens under a model that knows frequencies only.

    Args:
        counts: How often each token occurs in the text that is predicted.
        model: How often each token occurs in the text the frequencies are taken from. One is added
            to each, so that a token which is new to the model costs a finite amount.

    Returns:
        Cross-entropy in nats per token.
    """
    import numpy as np

    p = (model + 1) / (model.sum() + len(model))
    return float(-(counts * np.log(p)).sum() / counts.sum())


def _same(old: dict[str, Any], prefix: str, src: Source) -> bool:
    for split in SPLITS:
        for ending in ("bin", "idx"):
            with suppress(OSError, KeyError):
                size = os.path.getsize(f"{prefix}_{split}.{ending}")
                if size == old[split][f"{ending}_size"]:
                    continue
            return False
    digest = hashlib.sha256()
    for _ in _hashed(src.documents(), digest):
        pass
    return digest.hexdigest() == old.get("sha256")


def _hashed(documents: Iterable[bytes], digest: "hashlib._Hash") -> Iterator[bytes]:
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))  # where a document ends matters too
        digest.update(document)
        yield document


def _is_valid(index: int, split: tuple[int, int]) -> bool:
    """Whether document `index` is for validation: the first is, then one at regular distances."""
    train, valid = split
    return -(-(index + 1) * valid // (train + valid)) > -(-index * valid // (train + valid))


def _builder_class() -> type:
    """Megatron's IndexedDatasetBuilder, without what Megatron says about missing GPU packages."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    except ImportError as error:
        raise DataError(
            f"megatron-core cannot be imported ({error}); it writes the dataset: "
            "pip install 'megatron-s3[megatron]'"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return IndexedDatasetBuilder


def _write(
    src: Source, prefix: str, split: tuple[int, int], wanted: dict[str, Any]
) -> dict[str, Any]:
    import numpy as np

    new_builder = _builder_class()
    folder, name = os.path.split(os.path.abspath(prefix))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output-prefix {prefix}: {folder}: {error.strerror}") from error
    temporary = {s: os.path.join(folder, f".{name}_{s}.{os.getpid()}") for s in SPLITS}
    counts = {s: np.zeros(VOCAB_SIZE, dtype=np.int64) for s in SPLITS}
    documents = dict.fromkeys(SPLITS, 0)
    digest = hashlib.sha256()
    try:
        builders = {s: new_builder(f"{temporary[s]}.bin", dtype=np.uint16) for s in SPLITS}
        for index, document in enumerate(_hashed(src.documents(), digest)):
            side = "valid" if _is_valid(index, split) else "train"
            tokens = np.empty(len(document) + 1, dtype=np.uint16)
            tokens[:-1] = np.frombuffer(document, dtype=np.uint8)
            tokens[-1] = EOD
            builders[side].add_document(tokens, [len(tokens)])
            counts[side] += np.bincount(tokens, minlength=VOCAB_SIZE)
            documents[side] += 1
        for side in SPLITS:
            if not documents[side]:
                raise DataError(
                    f"--input {src}: {sum(documents.values())} documents with text; --split "
                    f"{split[0]},{split[1]} leaves none for {side}: give more, shorter documents"
                )
            builders[side].finalize(f"{temporary[side]}.idx")
        description = {
            **wanted,
            "sha256": digest.hexdigest(),
            "vocab_size": VOCAB_SIZE,
            "eod": EOD,
            "unigram_entropy": unigram_entropy(counts["valid"], counts["train"]),
        }
        for side in SPLITS:
            description[side] = {
                "documents": documents[side],
                "bytes": int(counts[side][:EOD].sum()),
                "entropy": unigram_entropy(counts[side], counts[side]),
                "bin_size": os.path.getsize(f"{temporary[side]}.bin"),
                "idx_size": os.path.getsize(f"{temporary[side]}.idx"),
            }
        _publish(temporary, prefix, description)
    finally:
        for path in temporary.values():
            for ending in ("bin", "idx", "json"):
                Path(f"{path}.{ending}").unlink(missing_ok=True)
    return description


def _publish(temporary: dict[str, str], prefix: str, description: dict[str, Any]) -> None:
    """Put the finished files in place so that a description never stands beside other files."""
    Path(f"{prefix}.json").unlink(missing_ok=True)
    for side, path in temporary.items():
        # Megatron keeps shuffled indices here under a key that ignores the content.
        shutil.rmtree(f"{prefix}_{side}/cache", ignore_errors=True)
        for ending in ("bin", "idx"):
            os.replace(f"{path}.{ending}", f"{prefix}_{side}.{ending}")
    last = f"{temporary['train']}.json"
    with open(last, "w", encoding="utf-8") as file:
        json.dump(description, file, indent=2)
        file.write("\n")
    os.replace(last, f"{prefix}.json")


def megatron_arguments(prefix: str) -> list[str]:
    """Megatron's command-line arguments for training on the dataset at `prefix`."""
    return [
        "--train-data-path", f"{prefix}_train",
        "--valid-data-path", f"{prefix}_valid",
        "--tokenizer-type", "NullTokenizer",
        "--vocab-size", str(VOCAB_SIZE),
    ]  # fmt: skip
