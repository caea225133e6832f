"""Single bits of a checkpoint's files, as the plugin's checks and as torch's loader see them."""

import argparse
import contextlib
import io
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_s3.storage import checksums
from megatron_s3.storage.errors import Damaged
from megatron_s3.storage.layout import SEAL, TRACKER
from tests.faults.bench import FORMATS, Bench
from tests.faults.rows import Row
from tests.harness.tensors import same, tensors

__all__ = ["flips", "reading"]


def flips(bench: Bench) -> list[Row]:
    """Single bits, in every file; and what a loader that compares nothing makes of them."""
    from megatron_s3 import log
    from megatron_s3.mcore.checkpoint import choice

    rows = []
    kinds = list(itertools.product(FORMATS, (True, False)))
    # The last stays: its tracker file is looked at.
    for format, sealed in reversed(kinds[: bench.args.formats]):
        work = bench.new("flipped") / "run"
        shutil.copytree(bench.reference(*FORMATS[format]), work)
        folder = work / "iter_0000006"
        if not sealed:
            (folder / SEAL).unlink()
        truth = _everything(folder)
        files = sorted(f for f in folder.iterdir() if f.is_file())
        if not sealed:
            files = [f for f in files if f.name in (".metadata", "metadata.json")]
        for path in files:
            name = f"{format}'s {path.name}" + ("" if sealed else ", no checksums.sha256")
            row = Row(f"a bit of {name}")
            data = path.read_bytes()
            count = min(bench.args.flips, len(data) * 8)
            for bit in sorted(bench.rng.sample(range(len(data) * 8), count)):
                with _flipped(path, data, bit):
                    row.add(**_judge(folder, path, truth, format), bit=bit)
            row.count("how")
            unseen = sum(t.get("unchecked") == "different" for t in row.tries)
            row.notes += f"; torch alone loads other values of {unseen}" if unseen else ""
            row.tries = [t for t in row.tries if t["how"] != "refused by name"]
            row.progress()
            rows.append(row)
    row = Row(f"a bit of {TRACKER}")
    path = work / TRACKER
    data = path.read_bytes()
    for bit in range(len(data) * 8):
        with _flipped(path, data, bit):
            try:
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    log.say_once.cache_clear()
                    chosen = choice.choose(work, argparse.Namespace(ckpt_step=None)).folder
                how = f"another complete iteration ({chosen.name}), and it is said"
                ok = (
                    chosen.name != "iter_0000006"
                    and "newer iterations are complete: " in said.getvalue()
                )
                outcome = "survived" if ok else "falsely_accepted"
            except Damaged as caught:
                how = "refused by name" if str(path) in str(caught) else "refused without name"
                outcome = "survived" if "by" in how else "lost"
            row.add(outcome, bit=bit, how=how)
    row.count("how")
    row.progress()
    return [*rows, row]


@contextlib.contextmanager
def _flipped(path: Path, data: bytes, bit: int) -> Iterator[None]:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        file.write(bytes([data[bit // 8] ^ (1 << bit % 8)]))
    try:
        yield
    finally:
        path.write_bytes(data)


def _everything(folder: Path) -> dict[str, Any]:
    """All that a checkpoint holds, as torch reads it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from megatron_s3.mcore.checkpoint import read

    found: dict[str, Any] = tensors(folder.parent, int(folder.name[5:]))
    index = dcp.FileSystemReader(folder).read_metadata()
    for key, place in index.storage_data.items():
        if not isinstance(index.state_dict_metadata[key.fqn], TensorStorageMetadata):
            with open(folder / place.relative_path, "rb") as file:
                file.seek(place.offset)
                found[key.fqn] = read.load_object(io.BytesIO(file.read(place.length)))
    return found


def _judge(folder: Path, path: Path, truth: dict[str, Any], format: str) -> dict[str, str]:
    def read() -> str:
        try:
            return "equal" if same(_everything(folder), truth) else "different"
        except (Exception, CheckpointException) as caught:  # the latter is a BaseException
            return type(caught).__name__

    try:
        checksums.check(folder, config=format == "torch_dist")
        for share in range(2):
            checksums.verify(folder, share, 2)
    except Damaged as caught:
        if path.name in str(caught):
            return {"outcome": "survived", "how": "refused by name", "unchecked": read()}
        return {"outcome": "lost", "how": f"refused by another name: {caught}"}
    as_read = read()
    if as_read == "equal":
        return {"outcome": "survived", "how": "harmless", "unchecked": as_read}
    if as_read != "different":  # not by name, but nothing is loaded
        return {"outcome": "survived", "how": f"fails in the loader ({as_read})"}
    return {"outcome": "falsely_accepted", "how": "accepted"}


def reading(bench: Bench) -> list[Row]:
    """What comparing the checksums costs: the same files read plainly, verified, and by torch."""
    folder = bench.new("large") / "iter_0000001"
    path = folder / "mp_rank_00/model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save([torch.randn(16 << 20) for _ in range(bench.args.megabytes // 64)], path)
    size = path.stat().st_size

    def plain() -> None:
        buffer = bytearray(4 << 20)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    ways: dict[str, Callable[[], Any]] = {
        "read": plain,
        "verified": lambda: checksums.verify(folder),
        "torch.load": lambda: torch.load(path, weights_only=True),
    }
    best = dict.fromkeys(ways, 0.0)
    plain()
    row = Row(f"none: {size / 1e9:.2f} GB from memory, 1 thread, best of 5")
    for _ in range(5):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            best[name] = max(best[name], size / 1e9 / (time.perf_counter() - began))
    row.notes = ", ".join(f"{name} {speed:.2f} GB/s" for name, speed in best.items())
    row.progress()
    return [row]
