"""The HTML page of a report, which needs no other file."""

import base64
import datetime
import html
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_s3.report.compare import Table
from megatron_s3.report.runs import Suite
from megatron_s3.version import __version__

if TYPE_CHECKING:
    from megatron_s3.report.panels import Picture

__all__ = ["made", "page", "title"]

_STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
.wide { overflow-x: auto; } td { white-space: nowrap; } th { vertical-align: bottom; }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #ccc; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5em 0; } img { max-width: 100%; } figcaption, .note { color: #444; }
code { overflow-wrap: anywhere; }
"""
#: A title names at most so many labels of runs.
_NAMED = 4


def title(suites: Sequence[Suite]) -> str:
    """Returns the title of a report: the labels of its runs, or how many there are."""
    runs = [run for suite in suites for run in suite.runs]
    labels = list(dict.fromkeys(run.label for run in runs))
    if len(labels) <= _NAMED:
        return f"Training runs: {', '.join(labels)}"
    optimizers = len({run.optimizer for run in runs})
    return f"{len(runs):,} training runs with {optimizers} optimizers"


def made(command: str) -> str:
    """Returns a sentence with the date, the version and the command of a report."""
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    commit = _commit()
    version = f"megatron_s3 {__version__}" + (f", commit {commit}" if commit else "")
    return (
        f"Made on {html.escape(now)} by {html.escape(version)}, Python "
        f"{sys.version.split()[0]}, with <code>{html.escape(command)}</code>"
    )


def page(
    heading: str, made_by: str, tables: Sequence[Table], shown: "Sequence[tuple[Picture, bytes]]"
) -> str:
    """Returns the page.

    Args:
        heading: its title.
        made_by: HTML that says when and how the page was made.
        tables: in the order in which they are shown.
        shown: pictures and their PNG files, shown below the tables.
    """
    titles = [_begun(table.title) for table in tables]
    titles += [_begun(picture.title) for picture, _ in shown]
    contents = "".join(f'<li><a href="#p{k}">{html.escape(t)}</a>' for k, t in enumerate(titles))
    heading = html.escape(heading)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{heading}</title><style>{_STYLE}</style><h1>{heading}</h1>",
        f"<p class=note>{made_by}</p><h2>Contents</h2><ul>{contents}</ul>",
    ]
    for k, table in enumerate(tables):
        head = "".join(f"<th>{html.escape(cell)}" for cell in table.headings)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in table.rows
        )
        parts.append(
            f"<h2 id=p{k}>{html.escape(titles[k])}</h2>"
            f"<div class=wide><table><tr>{head}{rows}</table></div>"
        )
        if table.note:
            parts.append(f"<p class=note>{html.escape(table.note)}</p>")
    for k, (_, png) in enumerate(shown, len(tables)):
        data = base64.b64encode(png).decode()
        text = html.escape(titles[k])
        parts.append(
            f'<figure id=p{k}><img alt="{text}" src="data:image/png;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return "\n".join(parts) + "\n"


def _begun(text: str) -> str:
    """Returns a title with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def _commit() -> str:
    """Returns the commit of the package's checkout; empty for an installed package."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return ""
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
