"""Documents to Megatron's indexed datasets."""

import hashlib
import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_s3 import data
from megatron_s3.data import corpus, dataset_parts, documents, indexed, tokenizers
from megatron_s3.data.__main__ import main
from megatron_s3.data.shards import Shard

pytest.importorskip("megatron.core")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty text files of different lengths, ü and an empty one among them."""
    made = tmp_path / "text"
    (made / "sub").mkdir(parents=True)
    for i in range(40):
        where = made / "sub" if i % 3 else made
        (where / f"{i}.txt").write_text(f"document {i} ü\n" * (i + 1), encoding="utf-8")
    (made / "empty.txt").write_text("")
    (made / "picture.png").write_bytes(b"\x89PNG\xff")
    return made


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def build(
    path: Path | str, prefix: Path | str, split: tuple[int, int] = (95, 5), **options: Any
) -> tuple[dict[str, Any], bool]:
    return data.build(data.source(str(path)), str(prefix), split, "bytes", **options)


def tokens(prefix: str) -> list[np.ndarray]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    # One sequence a document.
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [np.array(dataset[i]) for i in range(len(dataset))]


def as_text(document: np.ndarray) -> bytes:
    assert document[-1] == tokenizers.BYTES_EOD
    return document[:-1].astype(np.uint8).tobytes()


def test_every_document_is_in_one_split_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    prefix = str(tmp_path / "out" / "set")
    made, reused = build(folder, prefix)
    assert not reused
    texts = {split: [as_text(d) for d in tokens(f"{prefix}_{split}")] for split in corpus.SPLITS}
    written = sorted(p.read_bytes() for p in folder.rglob("*.txt") if p.read_bytes())
    assert sorted(texts["train"] + texts["valid"]) == written
    assert (len(texts["train"]), len(texts["valid"])) == (38, 2)
    for split, found in texts.items():
        assert made[split]["documents"] == len(found)
        assert made[split]["bytes"] == sum(map(len, found))
        assert made[split]["tokens"] == sum(map(len, found)) + len(found)
        for ending in ("bin", "idx"):
            content = Path(f"{prefix}_{split}.{ending}").read_bytes()
            assert made[split][f"{ending}_sha256"] == hashlib.sha256(content).hexdigest()
    assert made["tokenizer"] == {"name": "bytes", "vocab_size": 257, "eod": 256}
    assert not Path(f"{prefix}.parts").exists()
    assert data.load(prefix) == made


@given(st.integers(0, 500), st.integers(1, 99), st.integers(1, 99))
def test_split_has_the_parts_asked_for(count: int, train: int, valid: int) -> None:
    picked = sum(dataset_parts.is_valid(i, (train, valid)) for i in range(count))
    assert picked == math.ceil(count * valid / (train + valid))


@pytest.mark.parametrize(("train", "valid"), [(95, 5), (1, 1), (999, 1), (2, 1)])
def test_small_shards_of_unknown_place_keep_the_parts(train: int, valid: int) -> None:
    shard, count = Shard("jsonl", ("a",), ("",)), 4000
    picked = 0
    for number in range(count):
        first = dataset_parts.first_index(number, shard, (train, valid))
        picked += sum(dataset_parts.is_valid(first + i, (train, valid)) for i in range(number % 4))
    assert picked == pytest.approx(count * 1.5 * valid / (train + valid), rel=0.02, abs=4)


def test_sha256_is_of_the_documents_in_order(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    made, _ = build(file, tmp_path / "set", (1, 1))
    framed = (3).to_bytes(8, "little") + b"one" + (3).to_bytes(8, "little") + b"two"
    one_shard = hashlib.sha256(framed).hexdigest()
    assert made["sha256"] == hashlib.sha256(one_shard.encode()).hexdigest()


def test_unigram_entropy_is_validation_under_training(tmp_path: Path) -> None:
    # The first document is for validation.
    file = jsonl(tmp_path / "a.jsonl", {"text": "aab"}, {"text": "abbbb"})
    made, _ = build(file, tmp_path / "set", (1, 1))
    total = 6 + 257  # tokens of the training text with its end, and one of each
    expected = -(2 * math.log(2 / total) + math.log(5 / total) + math.log(2 / total)) / 4
    assert made["unigram_entropy"] == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any))
def test_no_frequencies_predict_a_text_better_than_its_own(counts: list[int]) -> None:
    own = np.array(counts)
    present = own[own > 0] / own.sum()
    assert corpus.unigram_entropy(own, own) >= -(present * np.log(present)).sum() - 1e-12


def test_same_source_is_reused_and_a_changed_one_rebuilt(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = str(tmp_path / "set")
    command = ["--input", str(folder), "--output-prefix", prefix, "--tokenizer", "bytes"]

    def run(*more: str) -> str:
        assert main([*command, *more]) == 0
        return capsys.readouterr().out.split()[0]

    assert run() == "wrote"
    written = os.stat(f"{prefix}_train.bin")
    assert run() == "reused"
    assert os.stat(f"{prefix}_train.bin") == written
    assert run("--split", "90,10", "--overwrite") == "wrote"
    assert run("--overwrite") == "wrote"
    file = folder / "0.txt"
    file.write_bytes(file.read_bytes().swapcase())
    assert run("--overwrite") == "wrote"
    os.truncate(f"{prefix}_valid.bin", 10)
    assert run() == "wrote"
    Path(f"{prefix}_train.idx").unlink()
    assert run() == "wrote"
    Path(f"{prefix}.json").write_text("{")
    assert run() == "wrote"
    assert run() == "reused"


def test_a_finished_dataset_of_something_else_is_not_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = str(tmp_path / "set")
    command = ["--input", str(folder), "--output-prefix", prefix, "--tokenizer", "bytes"]
    assert main(command) == 0
    files = {p.name: p.read_bytes() for p in tmp_path.glob("set*") if p.is_file()}

    def refused(said: str, *more: str) -> None:
        capsys.readouterr()
        assert main([*command, *more]) == 2
        err = capsys.readouterr().err
        assert said in err and "--overwrite" in err and err.count("\n") == 1
        assert {p.name: p.read_bytes() for p in tmp_path.glob("set*") if p.is_file()} == files
        assert not Path(f"{prefix}.parts").exists()

    refused("split [95, 5], now [90, 10]", "--split", "90,10")
    refused('now {"name": "gpt2"', "--tokenizer", "gpt2")
    refused("source {", "--glob", "0*")
    (folder / "another.txt").write_text("one more")
    refused("files of the input have changed since")
    assert main([*command, "--overwrite"]) == 0
    # Files of another program, which would be lost as well.
    Path(f"{prefix}.json").unlink()
    del files["set.json"]
    files |= {p.name: p.read_bytes() for p in tmp_path.glob("set_*") if p.is_file()}
    refused("set_train.bin exists, but no ")
    with pytest.raises(data.DataError, match=r"set_train\.bin exists, but no "):
        build(folder, prefix)


def test_rebuilding_removes_megatrons_indices_of_the_old_text(tmp_path: Path) -> None:
    prefix = str(tmp_path / "set")
    for text in ("old", "new"):
        file = jsonl(tmp_path / "a.jsonl", {"text": text}, {"text": text})
        build(file, prefix, (1, 1), overwrite=True)
        cache = tmp_path / "set_train" / "cache"
        assert not cache.exists()
        cache.mkdir(parents=True)


def test_a_failed_build_leaves_the_dataset_that_was_there(tmp_path: Path) -> None:
    prefix = str(tmp_path / "set")
    file = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    made, _ = build(file, prefix, (1, 1), overwrite=True)
    before = sorted(p.name for p in tmp_path.iterdir())
    jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "three"}, {"txt": "four"})
    with pytest.raises(data.DataError):
        build(file, prefix, (1, 1), overwrite=True)
    assert data.load(prefix) == made
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("renames", range(5))
def test_dying_while_files_are_put_in_place_leaves_no_whole_dataset(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = str(tmp_path / "set")
    file = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    build(file, prefix, (1, 1), overwrite=True)
    jsonl(file, {"text": "three"}, {"text": "four"})
    replace, done = os.replace, []

    def dying(*paths: str) -> None:
        if Path(paths[1]).name == "plan.json":  # not a file of the dataset
            return replace(*paths)
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(paths)
        replace(*paths)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        build(file, prefix, (1, 1), overwrite=True)
    assert data.load(prefix) is None
    monkeypatch.undo()
    _, reused = build(file, prefix, (1, 1), overwrite=True)
    assert not reused
    assert as_text(tokens(f"{prefix}_valid")[0]) == b"three"
    assert not Path(f"{prefix}.parts").exists()


BAD = {
    "empty name": ([b"a", b"b"], "", ["--input ''", "does not exist"]),
    "nothing there": ([], "no-such-place", ["--input", "no-such-place", "does not exist"]),
    "not a text format": ([b"x"], "file0.csv", ["file0.csv", ".jsonl", "folder"]),
    "no key": ([b'{"text": "a"}\n{"body": "b"}\n'], "file0.jsonl",
               ["file0.jsonl, line 2", "'text'", "'body'", "--json-key"]),
    "no object": ([b'{"text": "a"}\n[1]\n'], "file0.jsonl", ["line 2", "'text'"]),
    "no JSON": ([b'{"text": "a"}\n{"text": \n'], "file0.jsonl", ["line 2", "not JSON"]),
    "no string": ([b'{"text": 3}\n'], "file0.jsonl", ["line 1", "int", "not a string"]),
    "null": ([b'{"text": "a"}\n\n{"text": null}\n'], "file0.jsonl", ["line 3", "null"]),
    "line not UTF-8": ([b'{"text": "\xff"}\n'], "file0.jsonl", ["line 1", "UTF-8", "byte 10"]),
    "surrogate": ([b'{"text": "ab\\ud800"}\n'], "file0.jsonl", ["line 1", "surrogate"]),
    "one document": ([b'{"text": "a"}\n'], "file0.jsonl", ["1 documents", "none for train"]),
    "no document": ([b"\n"], "file0.jsonl", ["0 documents"]),
    "brackets": ([b'{"text": "a"}\n{"text": "b", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"],
                 "file0.jsonl", ["file0.jsonl, line 2", "nested too deeply"]),
    "digits": ([b'{"text": "a"}\n{"text": "b", "x": ' + b"1" * 5000 + b"}\n"], "file0.jsonl",
               ["file0.jsonl, line 2", "cannot be read (", "4300 digits"]),
    "no JSON lines": ([b'[\n{"text": "a"}\n]\n'], "file0.json", ["file0.json, line 1", "not JSON"]),
    "empty gzip": ([b""], "file0.jsonl.gz", ["file0.jsonl.gz", "0 bytes", "fetch it again"]),
    "empty zstandard": ([b""], "file0.jsonl.zst", ["file0.jsonl.zst", "0 bytes"]),
    "file not UTF-8": ([b"fine", b"ab\xff"], ".", ["file1.txt", "UTF-8", "byte 2"]),
    "no file matches": ([b"x"], "sub", ["sub", "*.txt", ".bin (1)", "--glob"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_error_and_status_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    contents, asked, said = BAD[name]
    monkeypatch.chdir(tmp_path)
    ending = "".join(Path(asked).suffixes) or ".txt"
    for i, content in enumerate(contents):
        Path(f"file{i}{ending}").write_bytes(content)
    Path("sub").mkdir()
    Path("sub/x.bin").write_bytes(b"x")
    command = ["--input", asked, "--output-prefix", "out/set", "--tokenizer", "bytes"]
    assert main([*command, "--workers", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in said:
        assert part in err
    assert not Path("out/set.json").exists()
    assert not Path("out").exists() or list(Path("out").iterdir()) == []


@pytest.mark.parametrize("prefix", ["", "out/", "out/.."])
def test_a_prefix_without_a_name_is_refused(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell passes on an empty word for a variable that is not set; a folder is no name."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    command = ["--input", "a.jsonl", "--tokenizer", "bytes", "--split", "1,1"]
    assert main([*command, "--output-prefix", prefix]) == 2
    assert f"--output-prefix {prefix!r}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("split", ["95", "95,0", "a,b", "95,5,1"])
def test_bad_split_is_refused(split: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--input", "stdlib", "--output-prefix", "x", "--split", split])
    assert stopped.value.code == 2
    assert "--split" in capsys.readouterr().err


def test_other_key_and_other_files(folder: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"body": "one"}, {"body": "two"})
    assert list(data.source(str(file), json_key="body").documents()) == [b"one", b"two"]
    chosen = list(data.source(str(folder), globs=["1?.txt"]).documents())
    assert sorted(chosen) == sorted(p.read_bytes() for p in folder.rglob("1?.txt"))


def test_standard_library_is_alike_each_time_and_has_no_tests() -> None:
    src = data.source("stdlib")
    files = documents._files(src)
    assert files == documents._files(src)
    assert files != sorted(files)
    assert "json/decoder.py" in files
    assert not [f for f in files if {"test", "tests", "site-packages"} & set(f.split("/")[:-1])]


def test_jsonl_is_never_whole_in_memory(tmp_path: Path) -> None:
    count, size = 64, 1 << 19
    file = tmp_path / "large.jsonl"
    with file.open("w") as out:
        for i in range(count):
            out.write(json.dumps({"text": chr(97 + i % 26) * size}) + "\n")
    prefix = tmp_path / "set"
    indexed.library()  # not to count the import
    tracemalloc.start()
    try:
        for reused in (False, True):
            made, was_reused = build(file, prefix)
            assert was_reused == reused
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made["train"]["bytes"] + made["valid"]["bytes"] == count * size
    assert peak < count * size / 2


def test_importing_does_not_import_megatron() -> None:
    code = "import sys, megatron_s3.data; print([m for m in sys.modules if m == 'megatron'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
