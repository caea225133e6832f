#!/usr/bin/env python3
"""Measures time and memory of `megatron-s3 convert`, compared with copying the checkpoint.

    python -m scripts.bench.convert [--checkpoints DIR] [--copies N] [--repeats N] [--cached]

In each round the newest iteration of DIR is copied (read once and written once, to the disk),
loaded and saved by torch (the tensors only, in one process), and converted.  Loading and converting
run in processes of their own.  Converting includes the import of Megatron, whose time is printed
too.  Each reads the checkpoint from the disk, or with --cached from the page cache, if it is there.
--scratch DIR is the folder for temporary files.

Without --checkpoints, the script trains a GPT of 163M parameters for one step with Megatron's AdamW
on 2 CPU ranks, and uses its checkpoint (2.3 GB; this needs 6 GB of memory and a minute).  --copies
N makes a larger checkpoint, with N copies of each tensor under N names, because training a model of
that size would need N times the memory.
"""

import argparse
import dataclasses
import functools
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.harness import trainer
from tests.harness.models import GPT2

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 4 << 20


def train(folder: Path) -> None:
    """Makes a checkpoint of AdamW."""
    print(f"training one step, saving to {folder}", flush=True)
    flags = ["--optimizer", "adam", "--bf16", "--use-distributed-optimizer", "--num-workers", "0"]
    flags += ["--dist-ckpt-optim-fully-reshardable", "--save", folder, "--save-interval", "1"]
    run = trainer.train(*GPT2, *flags, ranks=2, tiny=False, check=False)
    if run.returncode:
        sys.exit(f"error: no checkpoint could be made\n{run.log[-6000:]}")


def enlarge(source: Path, target: Path, copies: int) -> None:
    """Makes a checkpoint with several copies of another one's files and tensors."""
    import torch.distributed.checkpoint as dcp

    iteration = target / source.name
    iteration.mkdir(parents=True)
    (target / "latest_checkpointed_iteration.txt").write_text(str(int(source.name[5:])))
    shutil.copyfile(source / "metadata.json", iteration / "metadata.json")
    index = dcp.FileSystemReader(source).read_metadata()
    entries, places = {}, {}
    for number in range(copies):
        for file in source.glob("*.distcp"):
            shutil.copyfile(file, iteration / f"{number}{file.name}")
        end = f".{number}" if number else ""  # objects such as the arguments are read by name
        entries |= {name + end: entry for name, entry in index.state_dict_metadata.items()}
        places |= {
            dataclasses.replace(item, fqn=item.fqn + end): dataclasses.replace(
                place, relative_path=f"{number}{place.relative_path}"
            )
            for item, place in index.storage_data.items()
        }
    index.state_dict_metadata, index.storage_data = entries, places
    (iteration / ".metadata").write_bytes(pickle.dumps(index))


def copy(source: Path, target: Path) -> float:
    """Copies all files to the disk, and returns the seconds."""
    began = time.perf_counter()
    for file in sorted(f for f in source.rglob("*") if f.is_file()):
        to = target / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb") as reading, open(to, "wb") as writing:
            shutil.copyfileobj(reading, writing, BLOCK)
            writing.flush()
            os.fsync(writing.fileno())
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Drops the files from the page cache."""
    os.sync()
    for file in (f for f in folder.rglob("*") if f.is_file()):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


LOAD_AND_SAVE = """
import sys
import torch.distributed.checkpoint as dcp
from pathlib import Path
from tests.harness.tensors import contents
state = contents(Path(sys.argv[1]), objects=False)
dcp.save(state, storage_writer=dcp.FileSystemWriter(sys.argv[2]), no_dist=True)
"""
CONVERT = """
import sys
from megatron_s3.checkpoints import convert
if convert.main([*sys.argv[1:], "--to", "s3"]):
    sys.exit(1)
"""
START = "import megatron_s3.checkpoints.convert, megatron.core.safe_globals"


def process(code: str, *arguments: Path) -> tuple[float, float]:
    """Runs code in a process, and returns its seconds and its peak memory in GB."""
    code += "\nimport resource\nprint('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"error: {done.stdout}{done.stderr}")
    return seconds, int(re.findall(r"^KiB (\d+)", done.stdout, re.MULTILINE)[-1]) * 1024 / 1e9


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoints", type=Path, help="checkpoints of AdamW in the format torch_dist"
    )
    parser.add_argument("--copies", type=int, default=1, help="copies of each tensor")
    parser.add_argument("--cached", action="store_true", help="read from the page cache")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as temporary:
        folder = args.checkpoints
        if folder is None:
            folder = Path(temporary, "adamw")
            train(folder)
        iteration = max(folder.glob("iter_*"))
        if args.copies > 1:
            folder = Path(temporary, "larger")
            enlarge(iteration, folder, args.copies)
            iteration = folder / iteration.name
        size = sum(f.stat().st_size for f in iteration.rglob("*") if f.is_file()) / 1e9
        print(f"{iteration.name}: {size:.2f} GB")
        print(f"importing Megatron {min(process(START)[0] for _ in range(2)):.1f} s")
        print("copied  loaded, saved  converted    ratio to each    memory: torch  convert")
        ready = os.sync if args.cached else functools.partial(forget, iteration)
        ratios = []
        for _ in range(args.repeats):
            folders = [Path(temporary, name) for name in ("copy", "torch", "s3")]
            ready()
            plain = copy(iteration, folders[0])
            ready()
            torchs, most = process(LOAD_AND_SAVE, iteration, folders[1])
            ready()
            ours, memory = process(CONVERT, folder, folders[2])
            ratios.append((ours / plain, ours / torchs))
            one, other = ratios[-1]
            print(
                f"{plain:5.1f} s {torchs:12.1f} s {ours:8.1f} s {one:8.2f} {other:7.2f}"
                f" {most:14.2f} GB {memory:5.2f} GB",
                flush=True,
            )
            for each in folders:
                shutil.rmtree(each)
        one, other = map(statistics.median, zip(*ratios, strict=True))
        print(f"median {one:27.2f} {other:7.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
