"""Text to Megatron's indexed datasets: `megatron-s3 data --input DIR --output-prefix data/web`."""

import argparse
import os
import shlex
import sys

from megatron_s3.data import DataError, IncompleteError, build, hub, megatron_arguments, source
from megatron_s3.data.documents import left_out


def _split(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not two positive integers such as 95,5")
    return int(parts[0]), int(parts[1])


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-s3 data",
        description="Make an indexed dataset that Megatron-LM trains on. Broken off at any moment, "
        "the same command goes on where it stopped; the result is the same, byte for byte.",
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="DIR|FILE|NAME",
        help="a directory of .jsonl, .jsonl.gz, .jsonl.zst and .parquet files, or else of text "
        "files (one document each); one such file, or one of JSON lines whose name ends in .json "
        "or .ndjson (.gz, .zst); 'stdlib' (the standard library of this "
        f"Python); {', '.join(hub.NAMED)}; or hf:NAME[:CONFIG], any dataset on the Hugging Face "
        "hub",
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="what all files' names begin with"
    )
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="gpt2|bytes|DIR",
        help="GPT-2's BPE (default), a token for each byte, or the folder of a Hugging Face "
        "tokenizer",
    )
    parser.add_argument(
        "--workers",
        type=_workers,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (the CPUs of this process: %(default)s)",
    )
    parser.add_argument(
        "--json-key",
        metavar="KEY",
        help="key or column that holds the text (text; content for refinedweb)",
    )
    parser.add_argument(
        "--glob",
        action="append",
        metavar="PATTERN",
        help="files of a directory, by name; may be repeated (data files if there are any, else "
        "*.txt *.md *.rst *.py)",
    )
    parser.add_argument(
        "--revision", default="", metavar="COMMIT", help="commit, tag or branch on the hub (newest)"
    )
    parser.add_argument(
        "--split",
        type=_split,
        default=(95, 5),
        metavar="TRAIN,VALID",
        help="parts of the documents for training and validation (95,5)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a dataset of something else that is there under this prefix",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; the process's own when None.

    Returns:
        0; 1 if the work stopped and the same command goes on; 2 after one line on stderr if the
        input is unusable; 130 if it was interrupted.
    """
    args = _arguments(argv)
    again = "the same command goes on from here"
    try:
        src = source(args.input, args.json_key, args.glob, args.revision)
        made, reused = build(
            src, args.output_prefix, args.split, args.tokenizer, args.workers, args.overwrite
        )
        lost = left_out(src)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (IncompleteError, OSError) as error:
        print(f"error: {error}; {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {again}", file=sys.stderr)
        return 130
    if reused:
        print(f"reused    {args.output_prefix}.json: input and settings have not changed")
    else:
        print(f"wrote     {args.output_prefix}.json from {src}")
    for side in ("train", "valid"):
        part = made[side]
        print(
            f"{side:9} {part['documents']:,} documents, {part['bytes'] / 1e6:,.2f} MB, "
            f"{part['tokens']:,} tokens"
        )
    if made["blank_documents"]:
        print(f"left out  {made['blank_documents']:,} documents without text")
    for what in lost:
        print(f"left out  {what}")
    print(
        f"unigram   {made['unigram_entropy']:.3f} nats per token: validation loss of a model that "
        "knows the tokens' frequencies only"
    )
    print(f"Megatron  {shlex.join(megatron_arguments(args.output_prefix))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
