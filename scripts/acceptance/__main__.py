"""The acceptance command; ``scripts/gpu_acceptance.sh`` prepares a Python and runs this."""

import argparse
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from scripts.acceptance.rows import table
from scripts.acceptance.runner import Section, run_all, status, summary, write

__all__ = ["SECTIONS", "main"]

#: In the order in which they run, with the seconds after which each is ended.
SECTIONS = (
    Section("environment", "driver, packages, GPUs", 90),
    Section("kernels", "the kernel against the float64 reference and the portable step", 180),
    Section("memory", "bytes a parameter that the allocator gives out", 60),
    Section("graphs", "CUDA graphs of the step against eager steps", 180),
    Section("training", "Megatron's trainer with --optimizer s3, and bitwise resume", 300),
    Section("speed", "the step against AdamW's, and the kernel against a copy", 300),
    Section("sanitizer", "the kernel under compute-sanitizer", 250),
    Section("suite", "the tests of the kernel", 180),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections; prints the table; writes JSON, text and pictures.

    Returns:
        0 if nothing failed, 1 if something did, 2 without a GPU.
    """
    parser = argparse.ArgumentParser(
        prog="gpu_acceptance.sh", description="Whether this machine's GPUs and S3 on them are fit."
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", default=names)
    parser.add_argument("--skip", nargs="+", choices=names, metavar="SECTION", default=[])
    parser.add_argument("--limit", type=float, default=600, help="seconds for all (default: 600)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: acceptance/DATE-HOST")
    parser.add_argument("--cpu", action="store_true", help="rehearse what can run on a CPU")
    args = parser.parse_args(argv)
    chosen = [s for s in SECTIONS if s.name in args.only and s.name not in args.skip]
    device = "cpu" if args.cpu else "cuda"
    if not args.cpu and (why := _no_gpu()):
        listed = "; ".join(f"{s.name} ({s.what})" for s in chosen)
        print(f"no GPU: {why}. It would have run {listed}. --cpu rehearses on this machine's CPU.")
        return 2
    date = datetime.now(timezone.utc)
    output = args.output or Path("acceptance") / f"{date:%Y-%m-%d-%H%M%S}-{platform.node()}"
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    rows = run_all(chosen, device, output, args.limit, lambda line: print(line, flush=True))
    if args.cpu:
        note = "a rehearsal on the CPU: nothing here says anything about a GPU"
    else:
        note = "a bar is what the project wants of its speed; one that is missed fails nothing"
    text = "\n".join(["", table(rows), "", summary(rows), note])
    about = {
        "date": date.isoformat(timespec="seconds"),
        "host": platform.node(),
        "device": device,
        "command": shlex.join(sys.argv),
        "summary": summary(rows),
    }
    write(rows, about, text.strip(), output)
    print(text)
    print(
        f"written: {os.path.relpath(output)}/acceptance.json and .txt; "
        "each section's log and pictures in its folder"
    )
    return status(rows)


def _no_gpu() -> str | None:
    """Why there is no GPU to use, asked in a process that may hang or crash."""
    code = "import torch; print(torch.cuda.is_available() and torch.version.hip is None)"
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return "torch did not answer within 120 s whether there is one"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"torch does not start: {lines[-1]}"
    return None if done.stdout.strip() == "True" else "torch sees no NVIDIA GPU here"


if __name__ == "__main__":
    sys.exit(main())
