"""A full disk."""

import contextlib
import shutil
import subprocess
from pathlib import Path

from megatron_s3.storage.layout import INDEX, TRACKER
from tests.faults.bench import EVERY_OTHER, MODES, S3, Bench, last_file, latest, saved_at_once
from tests.faults.rows import Row
from tests.harness.tensors import same, tensors

__all__ = ["full_disk"]


def full_disk(bench: Bench) -> list[Row]:
    """A save for which there is not enough room, by more and by less, in a small tmpfs."""
    mount = bench.new("disk")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mount], capture_output=True, text=True
    )
    if made.returncode:
        print(f"full_disk: left out, nothing can be mounted here: {made.stderr.strip()}")
        return []
    try:
        return [_full(bench, mount, mode) for mode in MODES]
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def _full(bench: Bench, mount: Path, mode: str) -> Row:
    row = Row(f"disk full in a{'n' * (mode[0] == 'a')} {mode} save")
    end = bench.reference(*saved_at_once(mode))
    page = 4096
    one = end / "iter_0000004"
    data = sum(-(-f.stat().st_size // page) for f in one.glob("*.distcp"))
    index = -(-(one / ".metadata").stat().st_size // page)
    rooms = {
        "a part of the data": data // 2,
        "nothing fits": 0,
        "all but the last page of data": data - 1,
        "the data, a part of the index": data + index // 2,
        "no metadata.json": data + index,
        "no checksums": data + index + 1,
        "no tracker file": data + index + 2,
    }
    if last_file(mode) == INDEX:  # here they come in another order
        rooms = dict(list(rooms.items())[:4]) | {"no tracker file": data + index}
        rooms["no checksums"] = data + index + 1
    for name, pages in list(rooms.items())[: bench.args.disks]:
        folder = mount / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copytree(end / "iter_0000002", folder / "iter_0000002")
        (folder / TRACKER).write_text("2")
        flags = [*S3, *MODES[mode], "--train-iters", 6, *EVERY_OTHER]
        flags += ["--save", folder, "--load", folder]
        filler = mount / "filler"
        with open(filler, "wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(page))
            file.truncate(max(0, file.tell() - pages * page))
        first = bench.run(*flags)
        filler.unlink()
        left = latest(folder)
        second = bench.run(*flags)
        said = first.error
        ok = (
            first.returncode != 0
            and str(folder) in said
            and "No space left on device" in said
            and left in (2, 4)
            and second.loaded == left
            and second.returncode == 0
            and same(tensors(folder, 6), tensors(end, 6))
        )
        what = {"room": name, "latest": left, "said": said, "then": second.error}
        row.add("survived" if ok else "lost", **what)
        row.progress()
    return row
