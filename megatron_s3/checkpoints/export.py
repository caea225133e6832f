"""``megatron-s3 export``: a Megatron checkpoint as a Hugging Face GPT-2, with compared logits."""

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_s3.checkpoints import gpt2, vocabulary
from megatron_s3.checkpoints.errors import Mismatch
from megatron_s3.errors import MegatronS3Error, no_folder
from megatron_s3.log import say_here
from megatron_s3.mcore.checkpoint import forward, read
from megatron_s3.storage.layout import iteration_of
from megatron_s3.storage.writable import refuse_unwritable
from megatron_s3.version import __version__

__all__ = ["ExportError", "bound", "export", "main"]

_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_SAMPLE = 1024  # tokens compared


class ExportError(MegatronS3Error, ValueError):
    """Raised where a checkpoint cannot be exported; the message says why and what to do."""


def bound(args: argparse.Namespace, scale: float) -> float:
    """Returns the largest difference of logits that rounding in fp32 can explain.

    The sums in each of the 2 L sublayers and in the output have up to ``ffn_hidden_size`` terms.
    Independent rounding errors grow as the square root of the number of terms, and of the number of
    sublayers.  Differences between kernels of GPT-2 were 0.02 to 0.35 of this bound; the difference
    between exact and tanh gelu in a freshly initialized model was at least 3 times the bound.

    Args:
        args: Megatron's arguments.
        scale: the magnitude of the largest logit.
    """
    depth = math.sqrt(2 * args.num_layers + 1)
    return torch.finfo(torch.float32).eps * math.sqrt(args.ffn_hidden_size) * depth * scale


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    iteration: int | None = None,
    widen: bool = False,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Writes ``output`` atomically, after comparing its logits with Megatron's.

    Args:
        checkpoint: the folder of ``--save``, or of one iteration in it.
        output: the folder to make.
        iteration: the iteration to export; the last one saved if None.
        widen: whether to write float32, whatever the dtype of the checkpoint's weights.
        tokenizer: the folder of a tokenizer to copy; that of the run if None and it is a folder.
        vocab_size: rows of the vocabulary to keep; those of the tokenizer's tokens if None.

    Returns:
        The content of ``export.json``: where the model is from, and how far its logits differ.

    Raises:
        ExportError, gpt2.NotGPT2, read.CheckpointError: the input is unusable; nothing is written.
        Mismatch: the logits differ by more than rounding explains; the output is removed.
    """
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise ExportError(f"{output} exists: choose another folder, or remove it")
    if not output.absolute().parent.is_dir():
        raise ExportError(f"{output.parent}: {no_folder(output.parent)}; make it first")
    try:
        refuse_unwritable(output, "OUTPUT")
    except OSError as error:
        raise ExportError(str(error)) from error
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ExportError(f'{error}: pip install "megatron-s3[eval]"') from error

    found = read.find(checkpoint, iteration)
    say_here(f"reading {found}")
    args = read.arguments(found)
    gpt2.check(args)
    folder = _tokenizer_folder(args, tokenizer)
    rows = _vocab_size(args, folder, vocab_size)
    tensors = read.tensors(found)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ExportError(
            f"{found}: the dtypes of its weights are {', '.join(sorted(map(str, dtypes)))}, and "
            "one of float32, bfloat16 and float16 is expected. Save it from a run without FP8 "
            "weights."
        )
    dtype = torch.float32 if widen else dtypes.pop()
    state = {k: v.to(dtype) for k, v in gpt2.state_dict(args, tensors, rows).items()}
    del tensors

    part = output.absolute().parent / f".{output.name}.{os.getpid()}.part"
    part.mkdir()
    try:
        say_here(f"writing {sum(map(torch.numel, state.values())):,} parameters as {dtype}")
        _write(part, gpt2.config(args, rows, dtype), state, folder)
        del state
        largest, scale = _compare(part, found, args, rows)
        allowed = bound(args, scale)
        record = {
            "checkpoint": str(found.absolute()),
            "iteration": iteration_of(found),
            "largest_logit": scale,
            "largest_logit_difference": largest,
            "bound": allowed,
            "megatron_s3": __version__,
        }
        say_here(
            f"largest difference from Megatron's logits {largest:.1e}, largest logit {scale:.3g}; "
            f"rounding explains {allowed:.1e}"
        )
        if not largest <= allowed:
            raise Mismatch(
                f"{found}: Hugging Face's logits differ from Megatron's by {largest:.1e}, where "
                f"rounding explains {allowed:.1e}. {output} was not written. This is a "
                "fault of the export: report it with the arguments of the run."
            )
        (part / "export.json").write_text(json.dumps(record, indent=2) + "\n")
        part.rename(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return record


def _tokenizer_folder(args: argparse.Namespace, given: str | Path | None) -> Path | None:
    if given is None:
        of_run: str = getattr(args, "tokenizer_model", None) or ""
        if args.tokenizer_type != "HuggingFaceTokenizer" or not Path(of_run).is_dir():
            return None
        given = of_run
    folder = Path(given)
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise ExportError(
            f"--tokenizer {folder}: it holds neither vocab.json nor tokenizer.json; give the "
            "folder of a Hugging Face tokenizer"
        )
    return folder


def _vocab_size(args: argparse.Namespace, folder: Path | None, given: int | None) -> int:
    padded: int = args.padded_vocab_size
    if given is None and folder is not None:
        try:
            given = vocabulary.rows(folder)
        except Exception as error:
            raise ExportError(
                f"{folder}: transformers cannot read a tokenizer from it: {error}"
            ) from error
        source = f"the tokenizer {folder} numbers its tokens up to {given - 1}"
    else:
        source = f"--vocab-size {given}"
    if given is None:
        if args.tokenizer_type != "NullTokenizer":
            raise ExportError(
                f"the run's tokenizer ({args.tokenizer_type} {args.tokenizer_model}) is not a "
                f"folder on this machine, so it is unknown how many of the {padded} rows of the "
                "vocabulary are padding. Give the folder with --tokenizer, or the number with "
                "--vocab-size."
            )
        say_here(
            f"keeping all {padded} rows of the vocabulary, padding included; --vocab-size N keeps "
            "fewer"
        )
        return padded
    if not 0 < given <= padded:
        raise ExportError(
            f"{source}, but the model was trained with {padded} rows, padding included; give a "
            "number from 1 to that with --vocab-size"
        )
    return given


def _write(
    folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], tokenizer: Path | None
) -> None:
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoTokenizer, GPT2Config

    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if tokenizer:
        for name in _TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
        read = AutoTokenizer.from_pretrained(folder)
        ends = {name: getattr(read, name) for name in ends}
    GPT2Config(**config, **ends).save_pretrained(folder)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    for file in folder.glob("*.safetensors"):  # which only the owner may read, whatever the umask
        shutil.copymode(folder / "config.json", file)


def _compare(
    folder: Path, checkpoint: Path, args: argparse.Namespace, rows: int
) -> tuple[float, float]:
    """Returns the largest difference of the two models' logits, and the largest logit.

    The models run one after the other, so that only one of them is in memory.
    """
    length = min(args.max_position_embeddings, _SAMPLE)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(rows, (max(1, _SAMPLE // length), length), generator=generator)
    say_here(f"computing the logits of {tokens.numel()} tokens with Hugging Face")
    ours = _hugging_face(folder, tokens)
    say_here("computing the same logits with Megatron")
    theirs = forward.logits(checkpoint, tokens)[..., :rows]
    return (ours - theirs).abs().max().item(), theirs.abs().max().item()


def _hugging_face(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import GPT2LMHeadModel

    read: Any = GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    model, loading = read
    wrong = {kind: sorted(names) for kind, names in loading.items() if names}
    if wrong:
        raise Mismatch(
            f"Hugging Face does not load every tensor of the exported model: {wrong}. This is a "
            "fault of the export: report it with the arguments of the run."
        )
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(tokens).logits
    return logits


def main(argv: list[str]) -> int:
    """Runs the command.

    Returns:
        0; 2 after one line on stderr if the input is unusable, 1 if the comparison failed, 130 if
        it was interrupted.  The output folder exists only after 0.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-s3 export",
        description="Write a Megatron checkpoint as a Hugging Face GPT-2, and compare its logits "
        "with Megatron's. The checkpoint is unpickled: export only checkpoints that you trust.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder of --save, or of one iteration in it; format torch_dist, any layout, with or "
        "without Transformer Engine",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to make")
    parser.add_argument(
        "--iteration",
        type=int,
        metavar="N",
        help="iteration to export (default: the last one saved)",
    )
    parser.add_argument(
        "--dtype",
        choices=("checkpoint", "float32"),
        default="checkpoint",
        help="dtype of the written weights (default: that of the checkpoint)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="Hugging Face tokenizer to copy (default: that of the run, if it is a folder)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="rows of the vocabulary without padding (default: those of the tokenizer's tokens)",
    )
    args = parser.parse_args(argv)
    try:
        export(
            args.checkpoint,
            args.output,
            iteration=args.iteration,
            widen=args.dtype == "float32",
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size,
        )
    except (ExportError, gpt2.NotGPT2, read.CheckpointError, OSError, Mismatch) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Mismatch) else 2
    except KeyboardInterrupt:
        return 130
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
