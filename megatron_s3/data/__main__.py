"""The verb `data`, which converts text to Megatron's indexed datasets."""

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
        description="Converts text to an indexed dataset that Megatron-LM trains on. You can stop "
        "the command at any time; run it again to continue. The result is identical, byte by byte.",
        epilog="example: megatron-s3 data --input my_texts/ --output-prefix data/web",
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="DIR|FILE|NAME",
        help="text to convert: a folder of .jsonl, .jsonl.gz, .jsonl.zst and .parquet files; a "
        "folder of text files, each of which is one document; a single data file, which may "
        "also be JSON lines whose name ends in .json or .ndjson (.gz, .zst); 'stdlib', the "
        f"standard library of this Python; {', '.join(hub.NAMED)}; or hf:NAME[:CONFIG], any "
        "dataset on the Hugging Face hub",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="path that the names of all written files begin with",
    )
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="gpt2|bytes|DIR",
        help="GPT-2's BPE, one token for each byte, or the folder of a Hugging Face tokenizer "
        "(default: gpt2)",
    )
    parser.add_argument(
        "--workers",
        type=_workers,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="worker processes (default: the CPUs that this process may use, %(default)s)",
    )
    parser.add_argument(
        "--json-key",
        metavar="KEY",
        help="key or column that holds the text (default: text; content for refinedweb)",
    )
    parser.add_argument(
        "--glob",
        action="append",
        metavar="PATTERN",
        help="names of the files to read in a folder; may be repeated (default: the data files "
        "if there are any, otherwise *.txt *.md *.rst *.py)",
    )
    parser.add_argument(
        "--revision",
        default="",
        metavar="COMMIT",
        help="commit, tag or branch of a dataset on the hub (default: the newest commit)",
    )
    parser.add_argument(
        "--split",
        type=_split,
        default=(95, 5),
        metavar="TRAIN,VALID",
        help="proportion of documents for training and for validation (default: 95,5)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a dataset of another input or other settings that has this prefix",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; the process's own when None.

    Returns:
        0; 1 if the work stopped and the same command continues it; 2 after one line on stderr if
        the input is unusable; 130 if it was interrupted.
    """
    args = _arguments(argv)
    again = "run the same command again to continue"
    try:
        src = source(args.input, args.json_key, args.glob, args.revision)
        made, reused = build(
            src, args.output_prefix, args.split, args.tokenizer, args.workers, args.overwrite
        )
        lost = left_out(src, args.output_prefix)
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
