"""Datasets of the Hugging Face hub, which the `datasets` library streams file by file."""

import os
from collections.abc import Iterator
from typing import Any

from megatron_s3.data.errors import DataError, IncompleteError
from megatron_s3.data.shards import Shard

#: Names for `--input`: the dataset on the hub, and the column of its text.
NAMED = {
    "openwebtext": ("hf:Skylion007/openwebtext", "text"),
    "fineweb-10bt": ("hf:HuggingFaceFW/fineweb:sample-10BT", "text"),
    "fineweb-100bt": ("hf:HuggingFaceFW/fineweb:sample-100BT", "text"),
    "refinedweb": ("hf:tiiuae/falcon-refinedweb", "content"),
}


def shards(repository: str, config: str, revision: str, key: str) -> list[Shard]:
    """Returns the files of a dataset's train split, each at the commit that was found.

    Args:
        repository: The dataset's name on the hub, or a folder in a layout that `datasets` knows.
        config: Its configuration; when empty, the only or default one.
        revision: Commit, tag or branch; when empty, the newest commit.
        key: The column of the text.

    Raises:
        DataError: If there is no such dataset, or it cannot be reached.
    """
    datasets = _library()
    asked = ":".join(filter(None, (f"hf:{repository}", config)))
    try:
        builder = datasets.load_dataset_builder(
            repository, config or None, revision=revision or None
        )
    except Exception as error:  # errors of the library, the hub and the network
        raise DataError(
            f"--input {asked}: {_reason(error)}; check the name, the network and (for a gated "
            "dataset) HF_TOKEN, or give a folder of its files"
        ) from error
    splits = getattr(builder.config, "data_files", None) or {}
    if "train" not in splits:
        raise DataError(
            f"--input {asked}: has no files of a train split (its splits: "
            f"{', '.join(splits) or 'none'}); download the files and give their folder"
        )
    files = splits["train"]
    origins = ["@".join(map(str, origin)) for origin in files.origin_metadata]
    return [
        Shard(f"hub:{builder.name}", (str(file),), (origin,), key=key)
        for file, origin in zip(files, origins, strict=True)
    ]


def records(reader: str, file: str, key: str) -> Iterator[dict[str, Any]]:
    """Streams the records of one file.

    Args:
        reader: The reader of the `datasets` library, such as `parquet`.
        file: Address or path.
        key: The column of the text; no other column of a parquet file is fetched.

    Raises:
        IncompleteError: If the file cannot be fetched completely.
    """
    datasets = _library()
    try:
        options = {"columns": [key]} if reader == "parquet" else {}
        yield from datasets.load_dataset(
            reader, data_files={"train": [file]}, split="train", streaming=True, **options
        )
    except Exception as error:
        raise IncompleteError(f"{file}: {_reason(error)}") from error


def _library() -> Any:
    # The hub's own progress bars would be printed between the lines of this command.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "--input hf:…: reading from the hub needs the datasets library: pip install datasets"
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
