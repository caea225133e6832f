"""Trains with S3 under every feature of Megatron's that touches an optimizer, in every release.

    python -m tests.matrix [--release NAME=FOLDER ...] [--only REGEX] [--again REGEX] [--out DIR]
    python -m tests.matrix --print

A cell is a feature (a row of ROWS) in a release: a small GPT is trained for 5 steps on CPU ranks,
saved after 3, resumed from there, and everything in the two last checkpoints is compared bitwise:
weights, main parameters, states, param groups, schedule, random numbers. Where S3 does less than
that, the same is done with --optimizer adam, and the cell says which of the two is the reason.

FOLDER is an unpacked wheel of megatron-core, or a Megatron-LM tree, whose own pretrain_gpt.py is
then run (build megatron/core/datasets/helpers_cpp in it beforehand: make needs pybind11). The
installed wheel is always there. Cells are kept in DIR/matrix.json as they end, and only those that
are missing or named by --again (a regex of "RELEASE: ROW") are run; the table is DIR/matrix.md.
"""

import argparse
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.matrix.features import ROWS, Row
from tests.matrix.results import Results, markdown
from tests.matrix.trials import Release, Trial, releases


def _wanted(args: argparse.Namespace, results: Results, release: Release, row: Row) -> bool:
    label = f"{release.name}: {row.name}"
    if args.only is not None and not re.search(args.only, label):
        return False
    again = args.again is not None and re.search(args.again, label)
    return bool(again) or results.cell(release.name, row.name) is None


def main() -> int:
    """Runs the command; 1 if a cell is a defect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--only", metavar="REGEX", help="of RELEASE: ROW; leave out all others")
    parser.add_argument("--again", metavar="REGEX", help="of RELEASE: ROW; run these again")
    parser.add_argument("--out", type=Path, default=Path("runs/matrix"))
    parser.add_argument("--jobs", type=int, default=1, help="releases side by side")
    parser.add_argument("--print", action="store_true", help="print the table of what is known")
    args = parser.parse_args()
    results = Results(args.out)
    if not args.print:
        work = [
            (release, [row for row in ROWS if _wanted(args, results, release, row)])
            for release in releases(args.release)
        ]
        total, done = sum(len(rows) for _, rows in work), []

        def run(release: Release, rows: list[Row]) -> None:
            def losses(name: str) -> dict[str, str]:
                known = results.cell(release.name, name) or {"s3": {}}
                return known["s3"].get("losses", {})

            trial = Trial(release, losses)
            for row in rows:
                if not _wanted(args, results, release, row):
                    continue  # run by another of this meanwhile
                cell = trial.cell(row)
                results.keep(release, row, cell)
                done.append(row)
                said = f"{cell['verdict']}{': ' if cell['note'] else ''}{cell['note']}"
                print(f"{len(done)}/{total} {cell['seconds']:5.1f} s  {release.name}  {row.name}: "
                      f"{said[:300]}", flush=True)  # fmt: skip
            trial.close()

        with ThreadPoolExecutor(args.jobs) as pool:
            for future in [pool.submit(run, *each) for each in work if each[1]]:
                future.result()
        (args.out / "matrix.md").write_text(markdown(results.data) + "\n")
    print(markdown(results.data, merged=True))
    cells = [cell for cells in results.data["cells"].values() for cell in cells.values()]
    return int(any(cell["verdict"] == "defect" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
