"""The verb ``report``, which compares runs in tables and pictures."""

import argparse
import io
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_s3.report import compare, page
from megatron_s3.report.runs import RunError, Suite, left_out, load, written
from megatron_s3.report.tables import tables
from megatron_s3.storage.writable import refuse_unwritable
from megatron_s3.telemetry import runlog

if TYPE_CHECKING:
    from megatron_s3.report.panels import Picture


#: What a report keeps of a run's first record.
_KEPT = ("world_size", "global_batch_size", "seq_length", "flops")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb.

    Returns:
        0, or 2 if a folder holds no run or the report cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-s3 report",
        description="Compares finished or running runs in tables and pictures, and writes them to "
        "one HTML page.",
        epilog="example: megatron-s3 report runs/s3 runs/adamw",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help=(
        "folders of runs that were trained with --plugin-log-updates or --plugin-metrics, folders "
        "of several such runs (runs/quickstart, an array), or folders that scripts/reproduce.sh "
        "has written; give runs of several lengths to compare steps to equal loss"))  # fmt: skip
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report"),
        help="folder for report.html, report.json, tables.txt and PNG files (default: report)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="peak TFLOP/s of a device in the precision of the training, such as 989 (H100, bf16); "
        "adds the MFU to the table of speed",
    )
    args = parser.parse_args(argv)
    if args.peak_tflops is not None and not 0 < args.peak_tflops < math.inf:
        parser.error(f"--peak-tflops {args.peak_tflops:g} must be greater than 0, and finite")
    try:
        refuse_unwritable(args.output, "--output")
        suites = load(args.runs)
        toys = [written(toy) for run in args.runs if (toy := run / "toy.json").exists()]
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for damage in (damage for suite in suites for run in suite.runs for damage in run.damage):
        print(f"warning: {damage}", file=sys.stderr)
    for folder in left_out(args.runs):
        print(f"warning: {folder}: a run without a {runlog.NAME}; left out", file=sys.stderr)
    found = tables(suites, args.peak_tflops)
    for table in found:
        print(table, end="\n\n", flush=True)
    try:
        from megatron_s3.report.pictures import pictures

        shown = [(picture, _png(picture)) for picture in pictures(suites, toys)]
    except ImportError as error:
        print(
            f"error: pictures need matplotlib, which cannot be imported ({error}): "
            "pip install matplotlib",
            file=sys.stderr,
        )
        return 2
    try:
        command = shlex.join(["megatron-s3", "report", *(sys.argv[1:] if argv is None else argv)])
        made_by = page.made(command)
        _write(args.output, found, shown, suites, made_by)
    except OSError as error:
        print(f"error: --output {args.output}: {error}", file=sys.stderr)
        return 2
    counts = {"table": len(found), "picture": len(shown)}
    text = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
    print(f"wrote {args.output / 'report.html'}: {text}")
    return 0


def _write(
    output: Path,
    made: Sequence[compare.Table],
    shown: "Sequence[tuple[Picture, bytes]]",
    suites: Sequence[Suite],
    made_by: str,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for picture, png in shown:
        (output / f"{picture.name}.png").write_bytes(png)
    text = "\n\n".join(map(str, made)) + "\n"
    (output / "tables.txt").write_text(text, encoding="utf-8")
    (output / "report.json").write_text(_json(suites), encoding="utf-8")
    html = page.page(page.title(suites), made_by, made, shown)
    (output / "report.html").write_text(html, encoding="utf-8")


def _png(picture: "Picture") -> bytes:
    """Returns a picture as PNG in 64 colours, which makes the file three times smaller."""
    from PIL import Image  # matplotlib's own dependency

    file, small = io.BytesIO(), io.BytesIO()
    picture.figure.savefig(file, format="png")
    Image.open(file).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return small.getvalue()


def _json(suites: Sequence[Suite]) -> str:
    """Returns the values from which the tables are computed."""
    found = [
        {
            "suite": suite.name,
            "megatron": list(suite.words),
            "runs": [
                {
                    "experiment": run.experiment, "label": run.label, "optimizer": run.optimizer,
                    "lr": None if math.isnan(run.lr) else run.lr,
                    "seed": run.seed, "tags": dict(run.tags),
                    "iterations": run.iterations, "reached": run.reached,
                    "loss": [[i, runlog.finite(round(v, 6))] for i, v in run.loss],
                    "valid": [[i, runlog.finite(round(v, 7))] for i, v in run.valid],
                    **({} if math.isnan(run.test)
                       else {"test": runlog.finite(round(run.test, 7))}),
                    "max_abs_update": runlog.finite(run.largest),
                    **({"seconds": round(run.seconds, 4)} if math.isfinite(run.seconds) else {}),
                    "bound": run.bound, "spikes": list(run.spikes),
                    "start": {k: run.start[k] for k in _KEPT if k in run.start},
                }
                for run in suite.runs
            ],
        }
        for suite in suites
    ]  # fmt: skip
    return "[\n" + ",\n".join(
        json.dumps({k: v for k, v in suite.items() if k != "runs"})[:-1]
        + ', "runs": [\n' + ",\n".join(map(json.dumps, suite["runs"])) + "\n]}"
        for suite in found
    ) + "\n]\n"  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
