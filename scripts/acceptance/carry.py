"""Fills a folder with what a machine without network and git is given: ``carry DIR``.

Wheels, the commit, the shards that are measured and a dataset.  The folder may be ignored by git;
``scripts/gpu_acceptance.sh --carried DIR`` uses it.
"""

import subprocess
import sys
from pathlib import Path

from scripts.acceptance.prepare import dataset
from scripts.bench import memory
from scripts.bench.commit import write

__all__ = ["WHEELS", "main"]

#: What a Python with torch, NumPy and Triton may lack; without dependencies.
WHEELS = ("megatron-core==0.19.2", "psutil", "pyyaml", "hypothesis", "sortedcontainers")


def main(argv: list[str]) -> int:
    """Fills the folder, and prints how large it is.

    Returns:
        0, or 1 with the reason on stderr.
    """
    if len(argv) != 1:
        print("usage: python -m scripts.acceptance.carry DIR", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "COMMIT")
    download = ["-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    download += ["--only-binary=:all:", "-d", str(folder / "wheels"), *WHEELS]
    if subprocess.run([sys.executable, *download]).returncode:
        print("error: pip could not download the wheels; see above", file=sys.stderr)
        return 1
    if why := dataset(folder / "data" / "std"):
        print(f"error: no dataset: {why}", file=sys.stderr)
        return 1
    try:
        for shape in memory.SHAPES:
            memory.shards_of(shape, 0, "cpu", folder / "shards.json")
    except memory.Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    print(
        f"{folder}: {len(files)} files, {size:.1f} MiB; {(folder / 'COMMIT').read_text().strip()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
