"""Megatron's indices belong to a content of the data, not to a path."""

import os
from pathlib import Path

from megatron_s3 import data
from megatron_s3.launch import commands, content
from megatron_s3.launch.config import load


def made(tmp_path: Path, texts: int) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(texts)))
    data.build(data.source(str(source)), str(tmp_path / "set"), (1, 1), "bytes", overwrite=True)


def test_a_dataset_made_anew_has_other_indices_and_the_run_is_told(tmp_path: Path) -> None:
    made(tmp_path, 20)
    sets = [f"dataset={tmp_path}/set", "mock_data=false", "tokenizer_type=null", "vocab_size=null"]
    config, run_dir = load(["tiny-s3"], sets), tmp_path / "run"
    first = content.cache_folder(config, run_dir)
    words = commands.megatron_words(config, run_dir)
    assert words[words.index("--data-cache-path") + 1] == str(first)
    assert first.parent == run_dir / "data-cache"
    assert not content.changed(config, run_dir)  # nothing is there yet
    first.mkdir(parents=True)
    assert not content.changed(config, run_dir)
    os.utime(tmp_path / "set_train.bin")  # not what its content is
    assert content.cache_folder(config, run_dir) == first
    made(tmp_path, 8)
    assert content.cache_folder(config, run_dir) != first
    assert content.changed(config, run_dir)
    made(tmp_path, 20)
    assert content.cache_folder(config, run_dir) == first


def test_datasets_of_others_are_known_by_size_and_time(tmp_path: Path) -> None:
    for ending in ("idx", "bin"):
        (tmp_path / f"x.{ending}").write_bytes(b"1")
    for sets in (
        [f"data_path=[0.5, {tmp_path}/x, 0.5, {tmp_path}/y]"],
        [f"train_data_path={tmp_path}/x"],
        [f"data_args_path={tmp_path}/list"],
    ):
        (tmp_path / "list").write_text(f"1 {tmp_path}/x")
        config = load(["tiny-s3"], ["mock_data=false", *sets])
        first = content.cache_folder(config, tmp_path)
        (tmp_path / "x.idx").write_bytes((tmp_path / "x.idx").read_bytes() + b"1")
        assert content.cache_folder(config, tmp_path) != first


def test_made_up_data_have_one_place(tmp_path: Path) -> None:
    config = load(["tiny-s3"])
    assert content.cache_folder(config, tmp_path) == tmp_path / "data-cache"
    (tmp_path / "data-cache/x").mkdir(parents=True)
    assert not content.changed(config, tmp_path)
