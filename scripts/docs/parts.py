"""The parts of the pages that the code makes, each as Markdown."""

import functools
import json
import re
from collections.abc import Callable, Iterable

import tomllib
import yaml

from megatron_s3 import cli
from megatron_s3.launch import configs
from megatron_s3.launch.check import arithmetic
from megatron_s3.launch.config import load
from megatron_s3.launch.config_paths import shipped
from megatron_s3.mcore import seam, seams
from megatron_s3.mcore.arguments.flags import DEVICES, FOR_ALL, SWITCHES
from megatron_s3.mcore.arguments.names import flag, flag_named
from megatron_s3.mcore.arguments.rules import ABOUT_OVERRIDES, OVERRIDES
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.optimizers.description import Hyperparameter
from megatron_s3.report.tables import tables
from scripts.docs.pages import REPOSITORY
from scripts.docs.recorded import suites
from scripts.docs.troubleshooting import checkpoint_errors, troubleshooting

__all__ = ["PARTS"]

_RESULTS = REPOSITORY / "scripts" / "results"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a Markdown table; a bar inside a cell is escaped."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def _sentence(text: str) -> str:
    """Returns a help text as a sentence."""
    return f"{text[0].upper()}{text[1:]}."


def _default(h: Hyperparameter) -> str:
    if h.is_switch:
        return "off"
    return "none" if h.default is None else f"{h.default:g}"


def _range(h: Hyperparameter) -> str:
    if h.is_switch:
        return "switch"
    return f"[{h.low:g}, {h.high:g})".replace("[-inf", "(-inf")


def flags() -> str:
    """Returns the table of S3's own flags."""
    description = OPTIMIZERS["s3"].description
    rows = [
        (
            f"`{flag(description, h)}`",
            _default(h),
            _range(h),
            _sentence(f"do not {h.help}" if h.default is True else h.help),
        )
        for h in description.hyperparameters
    ]
    return _table(("flag", "default", "values", "meaning"), rows)


def optimizers() -> str:
    """Returns the table of the plugin's optimizers with their states and flags."""
    rows = []
    for name, cls in OPTIMIZERS.items():
        known = cls.description
        numbers = [f"`{flag(known, h)}` {_default(h)}" for h in known.hyperparameters]
        rows.append(
            (
                f"`{name}`",
                known.label,
                ", ".join(f"`{state}`" for state in known.state) or "none",
                f"{known.clip_grad:g}" if known.clip_grad else "none",
                ", ".join(numbers) if name != "s3" else "see above",
            )
        )
    return _table(("`--optimizer`", "name", "state", "clipping", "flags and defaults"), rows)


def switches() -> str:
    """Returns the table of the flags that hold for every optimizer of the plugin."""
    rows = [
        (
            f"`--plugin-device` {', '.join(DEVICES)}",
            "any optimizer",
            "Device to train on. `auto` (the default) selects the GPU if there is one, and "
            "otherwise the CPU with gloo.",
        ),
    ]
    rows += [
        (
            f"`{flag_named(name)}`",
            "any optimizer" if name in FOR_ALL else "the plugin's",
            _sentence(meaning),
        )
        for name, meaning in SWITCHES
    ]
    rows.append((f"`{flag_named(OVERRIDES)}` RULE ...", "the plugin's", _sentence(ABOUT_OVERRIDES)))
    return _table(("flag", "applies to", "meaning"), rows)


def _recorded(folder: str, words: str) -> str:
    """Returns the tables of recorded runs whose titles hold some words."""
    found = tables(suites(_RESULTS / folder / "report.json"))
    parts = [
        f"{table.title[0].upper()}{table.title[1:]}:\n\n{_table(table.headings, table.rows)}"
        for table in found
        if words in table.title
    ]
    return "\n\n".join(parts)


def lengths() -> str:
    """Returns the tables of the long runs: test losses, and AdamW's steps to the same ones."""
    return _recorded("2026-11-30-cpu-length", "final")


def settings() -> str:
    """Returns the tables of runs in which one setting was varied."""
    return _recorded("2026-11-30-cpu-length", "other settings")


def extrapolations() -> str:
    """Returns the table of the loss minus AdamW's at greater lengths."""
    return _recorded("2026-11-30-cpu-length", "extrapolated")


def recoveries() -> str:
    """Returns the table of runs that were disturbed."""
    return _recorded("2026-11-30-cpu-robustness", "disturbances")


def verbs() -> str:
    """Returns the table of the verbs of ``megatron-s3``."""
    rows = [(f"`megatron-s3 {name}`", _sentence(what)) for name, (_, what) in cli.VERBS.items()]
    return _table(("command", "what it does"), rows)


def _head(name: str) -> str:
    """Returns the comment at the beginning of a configuration, in one line."""
    text = (shipped() / f"{name}.yaml").read_text(encoding="utf-8")
    found = re.match(r"(?:#.*\n)+", text)
    return " ".join(line.lstrip("# ") for line in found[0].splitlines()) if found else ""


def configurations() -> str:
    """Returns the tables of the shipped configurations, layouts and overlays."""
    tables: dict[str, list[tuple[str, ...]]] = {"Configurations": [], "Layouts": [], "Overlays": []}
    for name in configs.names():
        config = load([name])
        shape = arithmetic(config)
        layout = f"{shape['data_parallel']} x {shape['tensor']} x {shape['pipeline']}"
        several = [f"Array: {key} {', '.join(v)}." for key, v in (config.array or {}).items()]
        row = (
            f"`{name}`",
            str(shape["world_size"]),
            layout,
            str(shape["global_batch_size"]),
            f"{int(config.arguments['train_iters']):,}",
            " ".join([_head(name), *several]).strip(),
        )
        folder = name.partition("/")[0].capitalize()
        tables[folder if folder in tables else "Configurations"].append(row)
    head = ("name", "ranks", "data x tensor x pipeline", "batch", "iterations", "about")
    return "\n\n".join(f"**{title}**\n\n{_table(head, rows)}" for title, rows in tables.items())


def support() -> str:
    """Returns the newest recorded matrix, each section of features in one row."""
    newest = sorted(_RESULTS.glob("*/matrix.json"))[-1]
    cells = json.loads(newest.read_text())["cells"]
    text = newest.with_suffix(".md").read_text(encoding="utf-8")
    releases = list(cells)
    rows = []
    for part in re.split(r"^\| \*\*", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("**")
        names = [row.split(" | ")[0][2:] for row in body.splitlines()[1:] if row.startswith("| ")]
        row = [title]
        for release in releases:
            found = [cells[release].get(name, {}).get("verdict", "absent") for name in names]
            works = found.count("bitwise")
            possible = len(found) - found.count("absent")
            row.append(f"{works} of {possible}")
        rows.append(row)
    return _table(["features that resume bitwise", *releases], rows)


def ecosystem() -> str:
    """Returns the table of ways of use and capabilities, and the command for each of its cells."""
    recorded = yaml.safe_load((REPOSITORY / "scripts/docs/ecosystem.yaml").read_text())
    shown: dict[str, int] = {}
    rows = []
    for way, tests in recorded["ways"].items():
        cells = [f"test {shown.setdefault(t, len(shown) + 1)}" if t else "not run" for t in tests]
        rows.append((way, *cells))
    commands = "\n".join(f"{n}. `python -m pytest {test}`" for test, n in shown.items())
    return _table(("way of use", *recorded["capabilities"]), rows) + "\n\n" + commands


def versions() -> str:
    """Returns the table of versions: what the package requires and what is tested."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = " ".join(project["dependencies"])
    pinned = dict(p.split("==") for p in project["optional-dependencies"]["quickstart"])
    # Once: the fast tests of optimizers, rules, kernels and mcore, on 2026-11-29; one fails where
    # all of them share a process, and was mended since.
    rows = [
        ("Python", project["requires-python"], "3.12", "3.13"),
        ("torch", re.findall(r"torch(\S+)", needed)[0], pinned["torch"], "2.14.1"),
        ("Triton", "the one of torch", "3.7.1", "3.8.0"),
        (
            "megatron-core",
            ">=0.16.1; from 0.17 on it needs Python 3.12",
            "0.17.1, 0.18.2, 0.19.2",
            "0.16.1, 0.19.0, main of 2026-08-22",
        ),
        (
            "Megatron-Bridge",
            "optional",
            "0.6.2",
            "0.4.0, 0.4.2, 0.5.0, 0.5.1, 0.6.0, main of 2026-08-22",
        ),
    ]
    return _table(("package", "required", "tested each time", "tested once"), rows)


def patched_functions() -> str:
    """Returns the table of what the plugin patches in Megatron."""
    rows = [
        (f"`{each.name}`", "replaced" if isinstance(each, seam.Replaced) else "wrapped",
         f"`{each.module}`", f"{each.purpose[0].upper()}{each.purpose[1:]}.")
        for each in seams.SEAMS
    ]  # fmt: skip
    return _table(("function or class", "is", "in", "the plugin's version"), rows)


#: Every part by its name.
PARTS: dict[str, Callable[[], str]] = {
    function.__name__.replace("_", "-"): functools.cache(function)
    for function in (
        flags, optimizers, switches, verbs, configurations, support, ecosystem, versions,
        patched_functions, lengths, settings, extrapolations, recoveries,
        troubleshooting, checkpoint_errors,
    )
}  # fmt: skip
