#!/usr/bin/env python3
"""Time and memory of `megatron-s3 convert`, beside reading and writing the same checkpoint.

    python scripts/bench_convert.py [--checkpoints DIR] [--repeats N] [--scratch DIR]

In turn: the newest iteration of DIR is read once and written once (a copy, to the disk), and
converted.  Without --checkpoints a GPT of 163M parameters is trained for one step by Megatron's
AdamW on 2 CPU ranks, and its checkpoint taken (2.6 GB; 6 GB of memory, a few minutes).
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# GPT-2's 12 layers of 768, embeddings untied.
MODEL = """--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 64
--max-position-embeddings 1024 --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 1e-4
--weight-decay 0.1 --mock-data --tokenizer-type NullTokenizer --vocab-size 50256
--untie-embeddings-and-output-weights --eval-iters 0 --eval-interval 1000 --num-workers 0
--optimizer adam --bf16 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable""".split()
BLOCK = 4 << 20


def train(folder: Path) -> None:
    """A checkpoint of AdamW's."""
    print(f"training one step, saving to {folder}", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "megatron_s3.pretrain_gpt", *MODEL, "--save", str(folder)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"error: no checkpoint could be made\n{(done.stdout + done.stderr)[-3000:]}")


def copy(source: Path, target: Path) -> float:
    """Seconds to read every file and to write it, to the disk."""
    began = time.perf_counter()
    for file in sorted(f for f in source.rglob("*") if f.is_file()):
        to = target / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb") as reading, open(to, "wb") as writing:
            shutil.copyfileobj(reading, writing, BLOCK)
            writing.flush()
            os.fsync(writing.fileno())
    return time.perf_counter() - began


def convert(source: Path, target: Path) -> tuple[float, float]:
    """Seconds, and the most memory in GB (of the process and its libraries)."""
    code = "import resource, sys; from megatron_s3.checkpoints import convert; " + (
        "status = convert.main(sys.argv[1:]); "
        "print('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, str(source), str(target), "--to", "s3"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"error: {' '.join(command[-4:])}\n{done.stdout}{done.stderr}")
    return seconds, int(re.findall(r"^KiB (\d+)", done.stdout, re.MULTILINE)[-1]) * 1024 / 1e9


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=Path, help="of AdamW, --ckpt-format torch_dist")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        folder = args.checkpoints
        if folder is None:
            folder = Path(temporary, "adamw")
            train(folder)
        iteration = max(folder.glob("iter_*"))
        size = sum(f.stat().st_size for f in iteration.rglob("*") if f.is_file()) / 1e9
        print(f"{iteration.name}: {size:.2f} GB")
        print("read + write      convert      ratio   memory")
        ratios = []
        for _ in range(args.repeats):
            plain = copy(iteration, Path(temporary, "copy"))
            seconds, memory = convert(folder, Path(temporary, "s3"))
            ratios.append(seconds / plain)
            print(
                f"{plain:10.1f} s {seconds:10.1f} s {ratios[-1]:10.2f} {memory:5.2f} GB", flush=True
            )
            for name in ("copy", "s3"):
                shutil.rmtree(Path(temporary, name))
        print(f"median ratio {statistics.median(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
