"""Construction of an indexed dataset of Megatron from documents.

The token `eod` ends each document. A dataset at `PREFIX` consists of::

    PREFIX_train.bin  PREFIX_train.idx  PREFIX_valid.bin  PREFIX_valid.idx
    PREFIX_tokenizer/  PREFIX.json

`PREFIX.json` describes the other files and is written last: if it exists, they are complete. Until
then `PREFIX.parts/` holds the finished parts; the same call continues from them and then removes
the folder.
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
    """Writes the dataset, continues an unfinished one, or reuses a finished one.

    A dataset is reused if it was made from the same source with the same split and tokenizer, the
    input's files have the same sizes and modification times as then, and its own files have the
    sizes with which they were written; a tokenizer that is not there is written again. The written
    files are identical, byte for byte, for any number of `workers` and however often the work was
    stopped.

    Args:
        src: The documents. They are read one at a time, never all at once.
        prefix: Path that all file names begin with; its folder is created.
        split: Proportion of documents for training and for validation.
        tokenizer: `gpt2`, `bytes` (a token is a byte of UTF-8) or the folder of a Hugging Face
            tokenizer.
        workers: Number of processes; with 1, the caller's process does the work. More processes
            need a caller whose main module can be imported, as `multiprocessing` requires.
        overwrite: Whether a dataset of another input or other settings at `prefix` is replaced.

    Returns:
        The description (the content of `PREFIX.json`) and whether the dataset was reused.

    Raises:
        DataError: If the source is unusable, leaves one side of the split empty, or is not the one
            from which the finished parts were made; if another dataset exists at `prefix`.
        IncompleteError: If a worker or the network failed; the same call continues the work.
    """
    if min(split) < 1:
        raise DataError(f"--split {split[0]},{split[1]}: both parts must be at least 1")
    if workers < 1:
        raise DataError(f"--workers {workers}: give at least 1")
    if os.path.basename(prefix) in ("", ".", ".."):
        raise DataError(
            f"--output-prefix {prefix!r}: the names of the files begin with it, so give a path "
            f"that ends in a name, such as {os.path.join(prefix, 'text')}"
        )
    shards = src.shards(prefix)
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
                _restore_tokenizer(made, prefix)
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
    """Returns the description of the complete dataset at `prefix`, or None if there is none."""
    try:
        with open(f"{prefix}.json", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == _FORMAT else None


def megatron_arguments(prefix: str) -> list[str]:
    """Returns Megatron's command-line arguments for training on the dataset at `prefix`.

    Raises:
        DataError: If there is no complete dataset.
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
    """Returns the mean cost of tokens under a model that knows only their frequencies.

    Args:
        counts: How often each token occurs in the text that is predicted.
        model: How often each token occurs in the text from which the model takes the frequencies.
            One is added to each, so that a token which is new to the model has a finite cost.

    Returns:
        Cross-entropy in nats per token.
    """
    import numpy as np

    p = (model + 1) / (model.sum() + len(model))
    return float(-(counts * np.log(p)).sum() / counts.sum())


def _versions() -> dict[str, str]:
    """Returns the versions of the packages on which the written bytes depend."""
    found = {}
    for package in ("megatron-core", "tokenizers", "datasets"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _refuse_to_replace(prefix: str, old: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """Rejects a prefix under which another command has written files.

    Raises:
        DataError: Such files exist.
    """
    instead = "give another --output-prefix, or --overwrite to replace it"
    if old and _whole(old, prefix):
        differing = [
            f"{key} {json.dumps(old.get(key))}, now {json.dumps(new)}"
            for key, new in wanted.items()
            if key != "input" and old.get(key) != new
        ] or ["files of the input have changed since then"]
        raise DataError(
            f"--output-prefix {prefix}: a finished dataset of another input or setting exists "
            f"({'; '.join(differing)}); {instead}"
        )
    if os.path.exists(f"{prefix}.json") or plan(f"{prefix}.parts"):
        return  # an incomplete dataset, or this command was killed while it moved the files
    for side in SPLITS:
        for ending in ("bin", "idx"):
            if os.path.exists(f"{prefix}_{side}.{ending}"):
                raise DataError(
                    f"--output-prefix {prefix}: {prefix}_{side}.{ending} exists, but no "
                    f"{prefix}.json that describes it; {instead}"
                )


def _whole(old: dict[str, Any], prefix: str) -> bool:
    try:
        return all(
            os.path.getsize(f"{prefix}_{side}.{ending}") == old[side][f"{ending}_size"]
            for side in SPLITS
            for ending in ("bin", "idx")
        )
    except OSError:
        return False


def _restore_tokenizer(made: Tokenizer, prefix: str) -> None:
    """Puts back the tokenizer of a dataset that is reused, if its files are lost or damaged."""
    if not made.folder:
        return
    there = Path(f"{prefix}_tokenizer")
    try:
        content = (there / "tokenizer.json").read_bytes()
        names = {path.name for path in there.iterdir()}
    except OSError:
        content, names = b"", set()
    lost = {path.name for path in Path(made.folder).iterdir()} - names
    if lost or hashlib.sha256(content).hexdigest() != made.sha256:
        shutil.rmtree(there, ignore_errors=True)
        os.replace(made.folder, there)


def _merge(
    src: Source, prefix: str, number_of_parts: int, tokenizer: Tokenizer, wanted: dict[str, Any]
) -> dict[str, Any]:
    """Joins the parts with Megatron's builder, in the folder that holds them."""
    folder = f"{prefix}.parts"
    described = [dataset_parts.finished(folder, n) for n in range(number_of_parts)]
    made = [part for part in described if part]
    if len(made) < number_of_parts:
        raise IncompleteError(
            f"{folder}: a finished part was removed or changed while this command ran"
        )
    totals = {
        side: {what: sum(p[side][what] for p in made) for what in ("documents", "bytes", "tokens")}
        for side in SPLITS
    }
    for side in SPLITS:
        if not totals[side]["documents"]:
            shutil.rmtree(folder)  # there is nothing to continue from
            raise DataError(
                f"--input {src}: has {sum(t['documents'] for t in totals.values())} documents with "
                f"text, and --split {wanted['split'][0]},{wanted['split'][1]} leaves none for "
                f"{side}; give more documents, or shorter ones"
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
                f"{path}.bin: damaged: it holds {found[0]} tokens and {found[1]} ends of documents"
                f", but its parts hold {totals[side]['tokens']} and {totals[side]['documents']}; "
                f"remove {folder}"
            )
        entropy = unigram_entropy(counts[side], counts[side])
        description[side] = {**totals[side], "entropy": entropy, **files}
    description["unigram_entropy"] = unigram_entropy(counts["valid"], counts["train"])
    return description


def _publish(prefix: str, description: dict[str, Any]) -> None:
    """Moves the finished files; a description never lies next to files of another dataset."""
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
