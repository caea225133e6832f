"""A shell script as a tree.

Each character keeps its place in the text, so that a caller can change the text of a command there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_s3.errors import MegatronS3Error

__all__ = [
    "UNKNOWN",
    "Argument",
    "Assignment",
    "Char",
    "HereDocument",
    "LaunchError",
    "Literal",
    "Node",
    "Substitution",
    "Variable",
    "Word",
    "characters",
    "value",
]

#: Stands for text that is known only when the script runs.
UNKNOWN = "\0"


class LaunchError(MegatronS3Error, ValueError):
    """Raised if a launch cannot be converted; the message says why and what to do.

    Args:
        place: the position in the text, if it is known.
    """

    def __init__(self, what: str, place: int | None = None) -> None:
        super().__init__(what)
        self.place = place


class Char(NamedTuple):
    """A character.

    Attributes:
        c: the character; UNKNOWN for text that is known only when the script runs.
        start: its position in the text.
        end: the position after it.
        via: the places, from the innermost to the outermost, of the expansions that produced it.
        name: for UNKNOWN, the source text.
    """

    c: str
    start: int
    end: int
    via: tuple[tuple[int, int], ...] = ()
    name: str = ""


@dataclass
class Literal:
    """Literal characters."""

    chars: list[Char]
    quoted: bool


@dataclass
class Variable:
    """``$NAME`` or ``${NAME...}``.

    Attributes:
        name: name of the variable, ``@`` or a number.
        index: ``@``, ``*``, a number, or other text in brackets.
        operator: the operator behind the name: ``-``, ``:-``, ``=``, ``:=``, ``+``, ``:+``; ``?``
            for all others.
        rest: the word behind the operator.
        unknown: stands for the value while that is unknown; it has the place of the whole.
    """

    name: str
    index: str
    operator: str
    rest: "Word"
    quoted: bool
    unknown: Char


@dataclass
class Substitution:
    """``$(...)``, `` `...` ``, ``$((...))``, ``<(...)``, whose result is known only when it runs.

    Attributes:
        body: the commands in it, if any.
        unknown: stands for the result; it has the place of the whole.
    """

    body: "Node | None"
    unknown: Char


Word = list[Literal | Variable | Substitution]

#: A word after expansion.
Argument = tuple[Char, ...]


@dataclass
class Assignment:
    """``NAME=VALUE``, ``NAME+=VALUE``, ``NAME[INDEX]=VALUE``, ``NAME=(VALUES)``.

    Attributes:
        name: name of the variable.
        index: the text in brackets; empty if there are none.
        append: whether the value is appended to the variable's value.
        value: the text after ``=``; empty if it is in parentheses.
        items: the words in parentheses; None if there are no parentheses.
    """

    name: str
    index: str
    append: bool
    value: Word
    items: list[Word] | None = None


@dataclass
class HereDocument:
    """A text that a command reads (``<<``, ``<<<``).

    Attributes:
        chars: the text; empty if the script ends before it.
        raw: whether it is taken literally.
    """

    chars: list[Char] = field(default_factory=list)
    raw: bool = False


@dataclass
class Node:
    """A command, or a construct of commands.

    Attributes:
        kind: ``command``, ``sequence`` (one after the other), ``pipeline``, ``maybe`` (after && or
            ||), ``if`` (children: conditions and bodies in turn, then else), ``loop``, ``for``,
            ``case``, ``function`` or ``subshell``.
        children: the nodes inside.
        name: name of a function or of the variable of a for; for the condition of an if, its text
            if it depends on variables alone; for the body of a case, its pattern.
        words: words of a command or a for.
        assignments: assignments before a command, or of export and similar commands.
        here: here-documents that a command reads.
        redirected: whether its output is written to a file.
        at: place of its first character.
    """

    kind: str
    children: list["Node"] = field(default_factory=list)
    name: str = ""
    words: list[Word] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    here: list[HereDocument] = field(default_factory=list)
    redirected: bool = False
    at: int = 0


def characters(text: str) -> list[Char]:
    """Returns the text as characters with their places."""
    return [Char(c, i, i + 1) for i, c in enumerate(text)]


def value(chars: Sequence[Char]) -> str:
    """Returns the characters as a string, with UNKNOWN for unknown text."""
    return "".join(char.c for char in chars)
