"""Tables and pictures of runs: ``megatron-s3 report RUNS ...``."""

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_s3.report import compare
from megatron_s3.report.runs import RunError, Suite, load
from megatron_s3.storage.writable import refuse_unwritable
from megatron_s3.telemetry import runlog

if TYPE_CHECKING:
    from megatron_s3.report.pictures import Picture

_STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #ccc; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5em 0; } img { max-width: 100%; } figcaption, .note { color: #444; }
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb.

    Returns:
        0, or 2 if there is no run in a folder, or nothing can be written.
    """
    parser = argparse.ArgumentParser(prog="megatron-s3 report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help=(
        "a folder of runs as scripts/reproduce.sh leaves it, of several lengths for the steps to "
        "equal loss; or runs of any other launch with --plugin-log-updates or --plugin-metrics, "
        "finished or running"))  # fmt: skip
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report"),
        help="folder for report.html, report.json, tables.txt and PNGs (report)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="of one device in the precision trained in, such as 989 (H100, bf16): adds the MFU",
    )
    args = parser.parse_args(argv)
    if args.peak_tflops is not None and args.peak_tflops <= 0:
        parser.error(f"--peak-tflops {args.peak_tflops:g} must be more than 0")
    try:
        refuse_unwritable(args.output, "--output")
        suites = load(args.runs)
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for damage in (damage for suite in suites for run in suite.runs for damage in run.damage):
        print(f"warning: {damage}", file=sys.stderr)
    tables = compare.tables(suites, args.peak_tflops)
    for table in tables:
        print(table, end="\n\n", flush=True)
    try:
        from megatron_s3.report.pictures import pictures

        drawn = pictures(suites, [p for run in args.runs if (p := run / "toy.json").exists()])
        shown = [(picture, _png(picture)) for picture in drawn]
    except ImportError as error:
        print(f"error: no pictures ({error}): pip install matplotlib", file=sys.stderr)
        return 2
    try:
        _write(args.output, tables, shown, suites)
    except OSError as error:
        print(f"error: --output {args.output}: {error}", file=sys.stderr)
        return 2
    print(f"{args.output / 'report.html'}: {len(tables)} tables, {len(shown)} pictures")
    return 0


def _write(
    output: Path,
    tables: Sequence[compare.Table],
    shown: "Sequence[tuple[Picture, bytes]]",
    suites: Sequence[Suite],
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for picture, png in shown:
        (output / f"{picture.name}.png").write_bytes(png)
    text = "\n\n".join(map(str, tables)) + "\n"
    (output / "tables.txt").write_text(text, encoding="utf-8")
    (output / "report.json").write_text(_json(suites), encoding="utf-8")
    (output / "report.html").write_text(_page(tables, shown), encoding="utf-8")


def _png(picture: "Picture") -> bytes:
    """Returns a picture in 64 colours, which are enough for these, and a third of the bytes."""
    from PIL import Image  # matplotlib's own dependency

    file, small = io.BytesIO(), io.BytesIO()
    picture.figure.savefig(file, format="png")
    Image.open(file).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return small.getvalue()


def _page(tables: Sequence[compare.Table], shown: "Sequence[tuple[Picture, bytes]]") -> str:
    """Returns one page that needs no other file."""
    parts = ["<!doctype html><meta charset=utf-8><title>S3 beside other optimizers</title>",
             f"<style>{_STYLE}</style><h1>S3 beside other optimizers</h1>"]  # fmt: skip
    for table in tables:
        head = "".join(f"<th>{html.escape(cell)}" for cell in table.headings)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in table.rows
        )
        parts += [f"<h2>{html.escape(table.title)}</h2><table><tr>{head}{rows}</table>",
                  f"<p class=note>{html.escape(table.note)}</p>"]  # fmt: skip
    for picture, png in shown:
        data = base64.b64encode(png).decode()
        title = html.escape(picture.title)
        parts.append(
            f'<figure><img alt="{title}" src="data:image/png;base64,{data}">'
            f"<figcaption>{title}</figcaption></figure>"
        )
    return "\n".join(parts) + "\n"


def _json(suites: Sequence[Suite]) -> str:
    """Returns what the tables rest on."""
    found = [
        {
            "suite": suite.name,
            "megatron": list(suite.words),
            "runs": [
                {
                    "experiment": run.experiment, "label": run.label, "optimizer": run.optimizer,
                    "lr": run.lr, "seed": run.seed, "tags": dict(run.tags),
                    "iterations": run.iterations, "reached": run.reached,
                    "loss": [[i, runlog.finite(round(v, 4))] for i, v in run.loss],
                    "valid": [[i, runlog.finite(round(v, 5))] for i, v in run.valid],
                    "max_abs_update": max((v for _, v in run.update("max_abs")), default=None),
                    "bound": run.bound, "spikes": list(run.spikes),
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
