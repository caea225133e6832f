"""One section in its own process: ``python -m scripts.acceptance.section NAME ...``."""

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

from scripts.acceptance.rows import Writer
from scripts.acceptance.task import Task

#: When this process began; importing a section's packages takes a part of its time.
_BEGIN = time.monotonic()
#: Modules of this package with a function ``check(writer, task)``.
SECTIONS = (
    "environment",
    "prepare",
    "kernels",
    "sanitizer",
    "suite",
    "training",
    "graphs",
    "memory",
    "speed",
    "gpt",
)


def main() -> None:
    """Runs a section's ``check``; what it raises is this process's end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        # Before Triton is imported: on a CPU its kernel is interpreted.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    module = importlib.import_module(f"scripts.acceptance.{args.name}")
    left = args.seconds - (time.monotonic() - _BEGIN)
    task = Task(args.device, args.output.absolute(), left, args.part, args.parts)
    with (args.output / "rows.jsonl").open("w", encoding="utf-8") as file:
        module.check(Writer(args.name, file), task)


if __name__ == "__main__":
    sys.exit(main())
