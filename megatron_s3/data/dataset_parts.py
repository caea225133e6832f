"""A shard of the input to a part of the dataset.

A part is a folder that appears whole, by one rename, or not at all::

    00012/  part.json  train.bin  train.idx  valid.bin  valid.idx

A side without documents has no files.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_s3.data import indexed, readers
from megatron_s3.data.shards import Shard
from megatron_s3.data.tokenizers import Tokenizer

SPLITS = ("train", "valid")
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024

#: Called with documents, bytes and tokens as they are done.
Report = Callable[[int, int, int], None]


def name(number: int) -> str:
    """Returns the name of the folder of part `number`."""
    return f"{number:05d}"


def identity(shard: Shard) -> str:
    """SHA-256 of what is to be read, by names, sizes and times of change."""
    return hashlib.sha256(json.dumps(asdict(shard)).encode()).hexdigest()


def is_valid(index: int, split: tuple[int, int]) -> bool:
    """Returns whether a document is for validation: the first is, then one at regular distances."""
    train, valid = split
    return -(-(index + 1) * valid // (train + valid)) > -(-index * valid // (train + valid))


def first_index(number: int, shard: Shard, split: tuple[int, int]) -> int:
    """Returns the index that shard `number` starts to count its documents from.

    Where that is not known without reading the shards before it, starts in the golden ratio's
    steps keep the parts of the split right even if each shard holds a few documents only.
    """
    if shard.before is not None:
        return shard.before
    return number * 618_033_988_749 % 10**12 * sum(split) // 10**12


def finished(folder: str, number: int) -> dict[str, Any] | None:
    """Returns part.json, if the part is there and its files are as long as they were written."""
    part = Path(folder, name(number))
    try:
        found: dict[str, Any] = json.loads((part / "part.json").read_text())
        for side in SPLITS:
            for ending in ("bin", "idx") if found[side]["documents"] else ():
                if os.path.getsize(part / f"{side}.{ending}") != found[side][f"{ending}_size"]:
                    return None
    except (OSError, ValueError, KeyError):
        return None
    return found


def write(
    folder: str,
    number: int,
    shard: Shard,
    tokenizer: Tokenizer,
    split: tuple[int, int],
    report: Report,
) -> None:
    """Write part `number`, from reading the shard to the rename.

    Raises:
        DataError: If the shard cannot be read or holds something else than text.
        IncompleteError: If the hub cannot be reached.
    """
    final = os.path.join(folder, name(number))
    temporary = f"{final}.tmp.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    os.mkdir(temporary)
    try:
        described = _fill(temporary, number, shard, tokenizer, split, report)
        with open(os.path.join(temporary, "part.json"), "w", encoding="utf-8") as file:
            json.dump(described, file)
        for path in Path(temporary).iterdir():
            _to_disk(path)
        shutil.rmtree(final, ignore_errors=True)  # not whole, or it would not be written again
        os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(
    folder: str,
    number: int,
    shard: Shard,
    tokenizer: Tokenizer,
    split: tuple[int, int],
    report: Report,
) -> dict[str, Any]:
    encode = tokenizer.encoder()
    builders: dict[str, Any] = {}
    sides: dict[str, dict[str, int]] = {
        side: {"documents": 0, "bytes": 0, "tokens": 0} for side in SPLITS
    }
    digest = hashlib.sha256()
    blank = 0
    index = first_index(number, shard, split)
    for batch in _batches(readers.documents(shard)):
        texts = [text for text in batch if text]
        blank += len(batch) - len(texts)
        total = 0
        for text, tokens in zip(texts, encode(texts), strict=True):
            digest.update(len(text).to_bytes(8, "little"))  # where a document ends matters too
            digest.update(text)
            side = "valid" if is_valid(index, split) else "train"
            index += 1
            if side not in builders:
                path = os.path.join(folder, side)
                builders[side] = indexed.builder(path, tokenizer.vocab_size)
            builders[side].add_document(tokens, [len(tokens)])
            total += len(tokens)
            for what, much in (("documents", 1), ("bytes", len(text)), ("tokens", len(tokens))):
                sides[side][what] += much
        report(len(texts), sum(map(len, texts)), total)
    for side, builder in builders.items():
        builder.finalize(os.path.join(folder, f"{side}.idx"))
        for ending in ("bin", "idx"):
            size = os.path.getsize(os.path.join(folder, f"{side}.{ending}"))
            sides[side][f"{ending}_size"] = size
    return {"shard": identity(shard), "sha256": digest.hexdigest(), "blank": blank, **sides}


def _batches(documents: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
