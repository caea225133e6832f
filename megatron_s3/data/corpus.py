"""Documents to tokens to Megatron's indexed datasets.

The token `eod` closes each document. A dataset at `PREFIX` is::

    PREFIX_train.bin  PREFIX_train.idx  PREFIX_valid.bin  PREFIX_valid.idx
    PREFIX_tokenizer/  PREFIX.json

`PREFIX.json` describes the others and is written last: where it stands, they are whole. Until then
`PREFIX.parts/` holds what is finished; the same call goes on from there, and removes it.
"""

import hashlib
import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_s3.data import dataset_parts, indexed, tokenizers
from megatron_s3.data.dataset_parts import SPLITS
from megatron_s3.data.documents import Source
from megatron_s3.data.errors import DataError, IncompleteError
from megatron_s3.data.tokenizers import Tokenizer
from megatron_s3.data.unfinished import locked, numbers, plan, resume
from megatron_s3.data.workers import Progress, write_parts

if TYPE_CHECKING:
    import numpy as np

_FORMAT = 2


def build(
    src: Source,
    prefix: str,
    split: tuple[int, int] = (95, 5),
    tokenizer: str = "gpt2",
    workers: int = 1,
    overwrite: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Write the dataset, or go on with it, or find it already there.

    A dataset is reused if it was made from the same source with the same split and tokenizer, the
    input's files have the sizes and times they had, and its own files the sizes they were written
    with. The files written are the same, byte for byte, whatever `workers` and however often the
    work was broken off.

    Args:
        src: The documents. Read one at a time, never all at once.
        prefix: Path that all file names begin with; its directory is made.
        split: Parts of the documents for training and for validation.
        tokenizer: `gpt2`, `bytes` (a token is a byte of UTF-8) or the folder of a Hugging Face
            tokenizer.
        workers: Processes; one works in the caller's. More need a caller whose main module can be
            imported, as `multiprocessing` does.
        overwrite: Whether a dataset of something else at `prefix` is replaced.

    Returns:
        The description (the content of `PREFIX.json`) and whether the dataset was reused.

    Raises:
        DataError: If the source is unusable, leaves one side of the split empty, or is not the one
            that the finished parts are of; if a dataset of something else is there.
        IncompleteError: If a worker or the network failed; the same call goes on.
    """
    if min(split) < 1:
        raise DataError(f"--split {split[0]},{split[1]}: both parts must be at least 1")
    if workers < 1:
        raise DataError(f"--workers {workers}: give at least 1")
    shards = src.shards()
    folder = f"{prefix}.parts"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output-prefix {prefix}: {folder}: {error.strerror}") from error
    with locked(folder):
        try:
            made = tokenizers.prepare(tokenizer, os.path.join(folder, "tokenizer"))
            wanted = {
                "format": _FORMAT,
                "source": src.describe(),
                "input": hashlib.sha256(
                    "".join(map(dataset_parts.identity, shards)).encode()
                ).hexdigest(),
                "split": list(split),
                "tokenizer": made.describe(),
            }
            old = load(prefix)
            settings = {**wanted, "versions": _versions()}
            if old and all(old.get(k) == v for k, v in wanted.items()) and _whole(old, prefix):
                if plan(folder) in ({}, settings):  # killed while its parts were removed
                    shutil.rmtree(folder)
                return old, True
            if not overwrite:
                _refuse_to_replace(prefix, old, wanted)
            before = resume(prefix, shards, settings)
            progress = Progress(shards)
            for number, part in before.items():
                progress.resumed(number, part)
            todo = [number for number in range(len(shards)) if number not in before]
            write_parts(folder, shards, todo, made, split, workers, progress)
            description = _merge(src, prefix, len(shards), made, wanted)
            progress.show(last=True)
            _publish(prefix, description)
            shutil.rmtree(folder)
            return description, False
        finally:
            if os.path.isdir(folder) and not numbers(folder):
                shutil.rmtree(folder)


def load(prefix: str) -> dict[str, Any] | None:
    """Returns the description of the whole dataset at `prefix`, or None if there is none."""
    try:
        with open(f"{prefix}.json", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == _FORMAT else None


def megatron_arguments(prefix: str) -> list[str]:
    """Megatron's command-line arguments for training on the dataset at `prefix`.

    Raises:
        DataError: If there is no whole dataset.
    """
    found = load(prefix)
    if not found:
        raise DataError(
            f"{prefix}.json: no dataset; make it with: megatron-s3 data --output-prefix {prefix}"
        )
    made = found["tokenizer"]
    if made["name"] == "bytes":
        named = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(made["vocab_size"])]
    else:
        named = ["--tokenizer-type", "HuggingFaceTokenizer"]
        named += ["--tokenizer-model", f"{prefix}_tokenizer"]
    return ["--train-data-path", f"{prefix}_train", "--valid-data-path", f"{prefix}_valid", *named]


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


def _versions() -> dict[str, str]:
    """Returns the versions of what decides the bytes that are written."""
    found = {}
    for package in ("megatron-core", "tokenizers", "datasets"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _refuse_to_replace(prefix: str, old: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """Refuses to lose what another command has made.

    Raises:
        DataError: It is there.
    """
    instead = "give another --output-prefix, or --overwrite to replace it"
    if old and _whole(old, prefix):
        differing = [
            f"{key} {json.dumps(old.get(key))}, now {json.dumps(new)}"
            for key, new in wanted.items()
            if key != "input" and old.get(key) != new
        ] or ["files of the input have changed since"]
        raise DataError(
            f"--output-prefix {prefix}: a finished dataset of something else is there "
            f"({'; '.join(differing)}); {instead}"
        )
    if os.path.exists(f"{prefix}.json") or plan(f"{prefix}.parts"):
        return  # one that is not whole, or this command, killed while it put the files in place
    for side in SPLITS:
        for ending in ("bin", "idx"):
            if os.path.exists(f"{prefix}_{side}.{ending}"):
                raise DataError(
                    f"--output-prefix {prefix}: {prefix}_{side}.{ending} is there, without a "
                    f"{prefix}.json that says what it is; {instead}"
                )


def _whole(old: dict[str, Any], prefix: str) -> bool:
    try:
        sizes = all(
            os.path.getsize(f"{prefix}_{side}.{ending}") == old[side][f"{ending}_size"]
            for side in SPLITS
            for ending in ("bin", "idx")
        )
    except OSError:
        return False
    return sizes and (old["tokenizer"]["name"] == "bytes" or os.path.isdir(f"{prefix}_tokenizer"))


def _merge(
    src: Source, prefix: str, number_of_parts: int, tokenizer: Tokenizer, wanted: dict[str, Any]
) -> dict[str, Any]:
    """Join the parts with Megatron's builder, into files beside them."""
    folder = f"{prefix}.parts"
    described = [dataset_parts.finished(folder, n) for n in range(number_of_parts)]
    made = [part for part in described if part]
    if len(made) < number_of_parts:
        raise IncompleteError(f"{folder}: a part has vanished or been changed")
    totals = {
        side: {what: sum(p[side][what] for p in made) for what in ("documents", "bytes", "tokens")}
        for side in SPLITS
    }
    for side in SPLITS:
        if not totals[side]["documents"]:
            shutil.rmtree(folder)  # nothing to go on with
            raise DataError(
                f"--input {src}: {sum(t['documents'] for t in totals.values())} documents with "
                f"text; --split {wanted['split'][0]},{wanted['split'][1]} leaves none for {side}: "
                "give more, shorter documents"
            )
    digest = hashlib.sha256("".join(p["sha256"] for p in made).encode()).hexdigest()
    description: dict[str, Any] = {
        **wanted,
        "versions": _versions(),
        "sha256": digest,
        "blank_documents": sum(p["blank"] for p in made),
    }
    counts = {}
    for side in SPLITS:
        path = os.path.join(folder, side)
        pieces = [
            os.path.join(folder, dataset_parts.name(number), side)
            for number, part in enumerate(made)
            if part[side]["documents"]
        ]
        indexed.join(path, pieces, tokenizer.vocab_size)
        files, counts[side] = indexed.sums(path, tokenizer.vocab_size)
        found = int(counts[side].sum()), int(counts[side][tokenizer.eod])
        if found != (totals[side]["tokens"], totals[side]["documents"]):
            raise IncompleteError(
                f"{path}.bin: {found[0]} tokens and {found[1]} ends of documents, where the parts "
                f"have {totals[side]['tokens']} and {totals[side]['documents']}; remove {folder}"
            )
        entropy = unigram_entropy(counts[side], counts[side])
        description[side] = {**totals[side], "entropy": entropy, **files}
    description["unigram_entropy"] = unigram_entropy(counts["valid"], counts["train"])
    return description


def _publish(prefix: str, description: dict[str, Any]) -> None:
    """Put the finished files in place so that a description never stands beside other files."""
    folder = f"{prefix}.parts"
    Path(f"{prefix}.json").unlink(missing_ok=True)
    shutil.rmtree(f"{prefix}_tokenizer", ignore_errors=True)
    for side in SPLITS:
        # Megatron keeps shuffled indices here under a key that ignores the content.
        shutil.rmtree(f"{prefix}_{side}/cache", ignore_errors=True)
        for ending in ("bin", "idx"):
            os.replace(f"{folder}/{side}.{ending}", f"{prefix}_{side}.{ending}")
    if os.path.isdir(f"{folder}/tokenizer"):
        os.replace(f"{folder}/tokenizer", f"{prefix}_tokenizer")
    last = f"{folder}/{os.path.basename(prefix)}.json"
    with open(last, "w", encoding="utf-8") as file:
        json.dump(description, file, indent=2)
        file.write("\n")
    os.replace(last, f"{prefix}.json")
