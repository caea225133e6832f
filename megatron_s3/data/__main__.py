"""Make an indexed dataset from text: `python -m megatron_s3.data --output-prefix data/stdlib`."""

import argparse
import shlex
import sys

from megatron_s3.data import DataError, build, megatron_arguments, source


def _split(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not two positive integers such as 95,5")
    return int(parts[0]), int(parts[1])


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; the process's own when None.

    Returns:
        0, or 2 after one line on stderr if the input is unusable.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_s3.data",
        description="Make an indexed dataset (byte-level tokens) that Megatron-LM trains on.",
    )
    parser.add_argument(
        "--input",
        default="stdlib",
        metavar="stdlib|DIR|FILE.jsonl",
        help="text: the standard library of this Python (default), the files of a directory, or "
        "JSON lines",
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="what all files' names begin with"
    )
    parser.add_argument(
        "--json-key", default="text", metavar="KEY", help="key of the text in a JSON line (text)"
    )
    parser.add_argument(
        "--glob",
        action="append",
        metavar="PATTERN",
        help="files of a directory, by name; may be repeated (*.txt *.md *.rst *.py)",
    )
    parser.add_argument(
        "--split",
        type=_split,
        default=(95, 5),
        metavar="TRAIN,VALID",
        help="parts of the documents for training and validation (95,5)",
    )
    args = parser.parse_args(argv)
    try:
        src = source(args.input, args.json_key, args.glob)
        made, reused = build(src, args.output_prefix, args.split)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if reused:
        print(f"reused    {args.output_prefix}.json: the text has not changed")
    else:
        print(f"wrote     {args.output_prefix}.json from {src}")
    for side in ("train", "valid"):
        part = made[side]
        print(f"{side:9} {part['documents']} documents, {part['bytes'] / 1e6:.2f} MB")
    print(
        f"unigram   {made['unigram_entropy']:.3f} nats per byte: validation loss of a model that "
        "knows byte frequencies only"
    )
    print(f"Megatron  {shlex.join(megatron_arguments(args.output_prefix))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
