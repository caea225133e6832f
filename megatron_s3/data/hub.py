"""Datasets of the Hugging Face hub, streamed file by file through the `datasets` library."""

import os
from collections.abc import Iterator
from typing import Any

from megatron_s3.data.errors import DataError, IncompleteError
from megatron_s3.data.shards import Shard

#: Names for `--input`: the dataset on the hub, and what it calls its text.
NAMED = {
    "openwebtext": ("hf:Skylion007/openwebtext", "text"),
    "fineweb-10bt": ("hf:HuggingFaceFW/fineweb:sample-10BT", "text"),
    "fineweb-100bt": ("hf:HuggingFaceFW/fineweb:sample-100BT", "text"),
    "refinedweb": ("hf:tiiuae/falcon-refinedweb", "content"),
}


def shards(repository: str, config: str, revision: str, key: str) -> list[Shard]:
    """Returns the files of a dataset's train split, each pinned to the commit that was found.

    Args:
        repository: The dataset's name on the hub, or a folder in a layout that `datasets` knows.
        config: Its configuration; the only or default one when empty.
        revision: Commit, tag or branch; the newest commit when empty.
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
    except Exception as error:  # its own kinds, the hub's and the network's
        raise DataError(
            f"--input {asked}: {_reason(error)}; check the name, the network and (for a gated "
            "dataset) HF_TOKEN, or give a folder of its files"
        ) from error
    splits = getattr(builder.config, "data_files", None) or {}
    if "train" not in splits:
        raise DataError(
            f"--input {asked}: no files of a train split (it has {', '.join(splits) or 'none'})"
        )
    files = splits["train"]
    origins = ["@".join(map(str, origin)) for origin in files.origin_metadata]
    return [
        Shard(f"hub:{builder.name}", (str(file),), (origin,), key=key)
        for file, origin in zip(files, origins, strict=True)
    ]


def records(reader: str, file: str, key: str) -> Iterator[dict[str, Any]]:
    """Stream the records of one file.

    Args:
        reader: The reader of the `datasets` library, such as `parquet`.
        file: Address or path.
        key: The column of the text; of parquet no other is fetched.

    Raises:
        IncompleteError: If the file cannot be fetched to its end.
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
    # Where both are set, the hub's own progress bars would run through ours.
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
