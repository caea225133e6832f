"""What becomes of runs and checkpoints when things break, with Megatron's trainer on CPU ranks.

    python -m tests.faults [--only NAME ...] [--kills N] [--flips N] [--seed N] [--out DIR]

Kills ranks in the middle of steps and of saves, sends signals, fills the disk, damages each file
of a checkpoint, spoils gradients on one rank, and resumes with what does not fit; then looks at
what is left.  Faults whose result is in DIR/faults.json with the same settings are not repeated
(--again does).  Writes DIR/faults.json and DIR/faults.txt.

Ranks are forks of this process (:mod:`tests.harness.forks`), killed with all they started, as
torchrun and SLURM do it.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from tests.faults.bench import Bench
from tests.faults.damage import damage
from tests.faults.disk import full_disk
from tests.faults.flips import flips, reading
from tests.faults.gradients import gradients
from tests.faults.kills import kills, overwrites
from tests.faults.misfits import misfits
from tests.faults.rows import report
from tests.faults.signals import signals
from tests.harness import forks

FAULTS = {
    f.__name__: f
    for f in (kills, overwrites, signals, full_disk, flips, damage, reading, gradients, misfits)
}


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="NAME",
                        help=f"of {', '.join(FAULTS)}")  # fmt: skip
    parser.add_argument("--kills", type=int, default=12, help="of each kind, a third in steps")
    parser.add_argument("--flips", type=int, default=200, help="bits of each file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--brief", action="store_true", help="a little of each, for CI")
    parser.add_argument("--again", action="store_true", help="also what has been done")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--scratch", type=Path, help="folder for the runs (default: in --out)")
    args = parser.parse_args()
    args.launches = not args.brief
    args.megabytes = 64 if args.brief else 1024
    # How many of the cases of a fault.
    few = (2, 1, 1, 1, 2, 1) if args.brief else (99,) * 6
    args.files, args.disks, args.misfits, args.optimizers, args.formats, args.overwritten = few
    if args.brief:
        args.kills, args.flips = 1, 20
    settings = {k: getattr(args, k) for k in ("kills", "flips", "seed", "brief")}

    sys.argv[1:] = []
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # of what is started
    os.environ.setdefault("LOCAL_WORLD_SIZE", "8")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    forks.prepare()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "faults.json"
    record = json.loads(path.read_text()) if path.exists() else {"faults": {}}
    scratch = (args.scratch or args.out).resolve() / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    bench = Bench(scratch, args)
    for name in args.only:
        found = record["faults"].get(name)
        if found and found["settings"] == settings and not args.again:
            continue
        began = time.monotonic()
        bench.rng.seed(f"{args.seed} {name}")
        rows = FAULTS[name](bench)
        record["faults"][name] = {
            "settings": settings,
            "seconds": round(time.monotonic() - began),
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "rows": [asdict(row) for row in rows],
        }
        record["machine"] = (
            f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}"
        )
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1).replace(f"{scratch}/", "") + "\n")
        part.replace(path)
    shutil.rmtree(scratch, ignore_errors=True)
    rows = [
        row for name in FAULTS if name in record["faults"] for row in record["faults"][name]["rows"]
    ]
    text = report(rows)
    (args.out / "faults.txt").write_text(text + "\n")
    print(text)
    return int(any(row["lost"] or row["falsely_accepted"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
