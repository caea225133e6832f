"""Asks Megatron for the shards and makes a dataset, once for all sections that need them."""

import shutil
import subprocess
import sys
from pathlib import Path

from scripts.acceptance.environment import installed
from scripts.acceptance.rows import Writer
from scripts.acceptance.task import Task

__all__ = ["check", "dataset"]

_ROOT = Path(__file__).resolve().parents[2]


def check(writer: Writer, task: Task) -> None:
    """Rows of both; neither needs a GPU or a network."""
    if not installed("megatron-core"):
        writer.skipped("shards and dataset", "megatron-core is not installed")
        return
    from scripts.bench import memory

    if why := dataset(task.data):
        writer.failed("dataset", why)
    else:
        size = task.data.with_name(task.data.name + "_train.bin").stat().st_size
        writer.passed("dataset", f"{size / 1e6:.1f} MB of the text of Python's standard library")
    for shape in memory.SHAPES:
        try:
            shards = memory.shards_of(shape, 0, task.device, task.shards)
        except memory.Unavailable as error:
            writer.failed(f"shards, {shape}", str(error))
        else:
            total = sum(shard.numel for shard in shards)
            writer.passed(f"shards, {shape}", f"{len(shards)} with {total:,} elements")


def dataset(prefix: Path) -> str | None:
    """Makes a dataset of bytes unless there is one; returns what went wrong, or None."""
    if prefix.with_name(f"{prefix.name}_train.bin").exists():
        return None
    prefix.parent.mkdir(parents=True, exist_ok=True)
    part = prefix.parent / "part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    words = "--input stdlib --tokenizer bytes --output-prefix".split()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_s3.cli", "data", *words, part / prefix.name],
        capture_output=True,
        text=True,
        cwd=_ROOT,
    )
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    for path in part.iterdir():
        path.rename(prefix.parent / path.name)
    part.rmdir()
    return None
