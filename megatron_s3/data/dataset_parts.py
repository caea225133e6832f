"""Parts of a dataset, each made from one shard of the input.

A part is a folder that one rename creates, so that it exists only when it is complete::

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

#: A function that is called with the numbers of documents, bytes and tokens of each batch.
Report = Callable[[int, int, int], None]


def name(number: int) -> str:
    """Returns the name of the folder of part `number`."""
    return f"{number:05d}"


def identity(shard: Shard) -> str:
    """Returns the SHA-256 of the names, sizes and modification times of a shard's files."""
    return hashlib.sha256(json.dumps(asdict(shard)).encode()).hexdigest()


def is_valid(index: int, split: tuple[int, int]) -> bool:
    """Returns whether a document is for validation: the first is, and others at equal distances."""
    train, valid = split
    return -(-(index + 1) * valid // (train + valid)) > -(-index * valid // (train + valid))


def first_index(number: int, shard: Shard, split: tuple[int, int]) -> int:
    """Returns the index from which shard `number` counts its documents.

    If it is not known without reading the earlier shards, the shards start at multiples of the
    golden ratio, which keeps the proportion of the split even if each shard holds few documents.
    """
    if shard.before is not None:
        return shard.before
    return number * 618_033_988_749 % 10**12 * sum(split) // 10**12


def finished(folder: str, number: int) -> dict[str, Any] | None:
    """Returns part.json if the part exists and its files have the sizes that it names."""
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
    """Writes part `number`: reads the shard, and renames the folder at the end.

    Raises:
        DataError: If the shard cannot be read or holds something other than text.
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
        shutil.rmtree(final, ignore_errors=True)  # incomplete, or it would not be written again
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
