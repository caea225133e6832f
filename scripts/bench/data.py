"""Measures tokens per second of `megatron-s3 data` and of Megatron's preprocess_data.py.

    python -m scripts.bench.data MEGATRON-LM [--input FILE.jsonl] [--workers N] [--repeats N]

Both convert the same text to GPT-2 tokens, in turn and with the same number of workers. The time is
that of the whole command, including start and merge. `megatron-s3 data` also writes the split,
checksums and entropies.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_s3 import data
from megatron_s3.data import indexed, tokenizers


def _timed(command: list[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def main() -> int:
    """Runs both commands and prints the table.

    Returns:
        0, or 1 if the numbers of tokens differ.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument(
        "--input",
        type=Path,
        help="JSON lines with a key 'text' (default: Python's standard library)",
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    tool = args.megatron / "tools" / "preprocess_data.py"
    if not tool.is_file():
        parser.error(f"{args.megatron}: no tools/preprocess_data.py; give a Megatron-LM checkout")
    with tempfile.TemporaryDirectory() as temporary:
        text = args.input
        if text is None:
            text = Path(temporary, "stdlib.jsonl")
            with text.open("w") as file:
                for document in data.source("stdlib").documents():
                    file.write(json.dumps({"text": document.decode()}) + "\n")
        folder = f"{temporary}/tokenizer"
        tokenizers.prepare("gpt2", folder)
        root = str(Path(__file__).resolve().parents[2])
        seconds: dict[str, list[float]] = {"megatron-s3 data": [], "preprocess_data.py": []}
        tokens = {}
        for repeat in range(args.repeats):
            print(f"{repeat + 1} of {args.repeats} ...", file=sys.stderr)
            ours = f"{temporary}/ours{repeat}"
            command = [sys.executable, "-m", "megatron_s3.data", "--input", str(text)]
            command += ["--output-prefix", ours, "--workers", str(args.workers)]
            environment = {**os.environ, "PYTHONPATH": root}
            seconds["megatron-s3 data"].append(_timed(command, environment))
            made = data.load(ours)
            tokens["megatron-s3 data"] = made["train"]["tokens"] + made["valid"]["tokens"]

            theirs = f"{temporary}/theirs{repeat}"
            command = [sys.executable, str(tool), "--input", str(text), "--output-prefix", theirs]
            command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
            command += ["--append-eod", "--workers", str(args.workers)]
            environment = {**os.environ, "PYTHONPATH": str(args.megatron.resolve())}
            seconds["preprocess_data.py"].append(_timed(command, environment))
            found, _ = indexed.sums(f"{theirs}_text_document", made["tokenizer"]["vocab_size"])
            tokens["preprocess_data.py"] = found["bin_size"] // 2  # of uint16
    megabytes = (made["train"]["bytes"] + made["valid"]["bytes"]) / 1e6
    print(f"{megabytes:.1f} MB of text, {args.workers} workers, {args.repeats} runs in turn")
    print(f"{'':20} {'tokens':>12} {'tokens/s':>12} {'MB/s':>8}   seconds of each run")
    for name, each in seconds.items():
        median = statistics.median(each)
        print(
            f"{name:20} {tokens[name]:12,} {tokens[name] / median:12,.0f} "
            f"{megabytes / median:8.2f}   {' '.join(f'{s:.1f}' for s in each)}"
        )
    return int(len(set(tokens.values())) > 1)


if __name__ == "__main__":
    sys.exit(main())
