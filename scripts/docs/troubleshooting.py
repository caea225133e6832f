"""The list of errors: every message that the package raises on purpose, with its cause and cure.

The messages are read from the code (:func:`raised`); causes and cures are in the files of
``errors/``, in which ``…`` stands for what a message fills in.
"""

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.docs.pages import REPOSITORY

__all__ = [
    "Raised",
    "checkpoint_errors",
    "entries",
    "fixed_text",
    "raised",
    "texts",
    "troubleshooting",
]

#: A message whose fixed text is shorter than this is put together elsewhere.
_SHORTEST = 12


@dataclass(frozen=True)
class Raised:
    """A message of the package's.

    Attributes:
        where: file and line, from the repository's top.
        message: its text, with … for what is filled in.
    """

    where: str
    message: str


def _template(node: ast.expr | None) -> str:
    """Returns the text of an expression that makes a message, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        text = "".join(
            str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
        return re.sub("…+", "…", text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return re.sub("…+", "…", _template(node.left) + _template(node.right))
    return "…"


def fixed_text(message: str) -> str:
    """Returns the words of a message that never change."""
    return " ".join(re.findall(r"\w+", message.replace("…", " ")))


def texts(file: Path) -> list[str]:
    """Returns the texts of a source file, neighbouring ones joined as Python joins them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.JoinedStr, ast.Constant)
    return [_template(node) for node in ast.walk(tree) if isinstance(node, kinds)]


@functools.cache
def raised(package: Path = REPOSITORY / "megatron_s3") -> tuple[Raised, ...]:
    """Returns each message of a ``raise`` statement, once.

    Messages with hardly any fixed text (``{file}: {reason}``) are left out: the reason is a
    message of its own, or one of another program.
    """
    found: dict[str, Raised] = {}
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                message = _template(node.exc.args[0])
                if len(fixed_text(message)) >= _SHORTEST:
                    where = f"{file.relative_to(package.parent).as_posix()}:{node.lineno}"
                    found.setdefault(message, Raised(where, message))
    return tuple(found.values())


@functools.cache
def entries() -> dict[str, list[dict[str, Any]]]:
    """Returns the sections of the files of ``errors/``, by their titles.

    Each is a list of entries: ``messages`` (a list), ``cause`` and ``cure``.
    """
    sections: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(Path(__file__).with_name("errors").glob("*.yaml")):
        sections |= yaml.safe_load(file.read_text(encoding="utf-8"))
    return sections


def troubleshooting() -> str:
    """Returns the tables of errors, one a section."""
    return _tables(entries())


def checkpoint_errors() -> str:
    """Returns the tables of the sections about checkpoints and the commands that read them."""
    about = re.compile("checkpoint|convert|export|eval", re.IGNORECASE)
    return _tables({title: listed for title, listed in entries().items() if about.search(title)})


def _tables(sections: dict[str, list[dict[str, Any]]]) -> str:
    text = []
    for title, listed in sections.items():
        text += [f"### {title}", "", "| message | cause | what to do |", "|---|---|---|"]
        for entry in listed:
            messages = "<br>".join(f"`{message}`" for message in entry["messages"])
            row = (messages, entry["cause"], entry["cure"])
            text.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
        text.append("")
    return "\n".join(text)
