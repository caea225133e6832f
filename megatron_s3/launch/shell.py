"""A shell script as a tree.

Each character keeps the place where it stands in the text, so that what a program finds out about
a script's commands can be changed there.
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
    "Literal",
    "Node",
    "ShellError",
    "Substitution",
    "Variable",
    "Word",
    "characters",
    "value",
]

#: Stands for text that is known only when the script runs.
UNKNOWN = "\0"


class ShellError(MegatronS3Error, ValueError):
    """The text is not shell, or not of the kind that is read here.

    Args:
        place: where in the text.
    """

    def __init__(self, what: str, place: int) -> None:
        super().__init__(what)
        self.place = place


class Char(NamedTuple):
    """A character.

    Attributes:
        c: the character; UNKNOWN for text that is known only when the script runs.
        start: where it stands in the text.
        end: one past it.
        via: the places, from the innermost to the outermost, at which expansions brought it here.
        name: of UNKNOWN, what stands in the text.
    """

    c: str
    start: int
    end: int
    via: tuple[tuple[int, int], ...] = ()
    name: str = ""


@dataclass
class Literal:
    """Characters as they stand."""

    chars: list[Char]
    quoted: bool


@dataclass
class Variable:
    """``$NAME`` or ``${NAME...}``.

    Attributes:
        name: of the variable, ``@`` or a number.
        index: ``@``, ``*``, a number, or what else stands in brackets.
        operator: what follows the name: ``-``, ``:-``, ``=``, ``:=``, ``+``, ``:+``; ``?`` for all
            others.
        rest: the word behind the operator.
        at: the first character of the whole.
        span: its place.
    """

    name: str
    index: str
    operator: str
    rest: "Word | None"
    quoted: bool
    at: Char
    span: tuple[int, int]


@dataclass
class Substitution:
    """``$(...)``, `` `...` ``, ``$((...))``, ``<(...)``: known only when it runs.

    Attributes:
        body: the commands in it, if there are any.
        text: what stands there.
    """

    body: "Node | None"
    text: str
    quoted: bool
    at: Char
    span: tuple[int, int]


Word = list[Literal | Variable | Substitution]

#: A word after expansion.
Argument = tuple[Char, ...]


@dataclass
class Assignment:
    """``NAME=VALUE``, ``NAME+=VALUE``, ``NAME=(VALUES)``.

    Attributes:
        name: of the variable.
        append: whether the value comes behind what the variable holds.
        value: what follows ``=``; empty if that is in parentheses.
        array: whether the variable is an array.
        items: the words in parentheses; None if there are no parentheses.
    """

    name: str
    append: bool
    value: Word
    array: bool = False
    items: list[Word] | None = None


@dataclass
class HereDocument:
    """A text that a command reads (``<<``, ``<<<``).

    Attributes:
        chars: the text; empty where the script ends before it.
        raw: whether it is taken as it stands.
    """

    chars: list[Char] = field(default_factory=list)
    raw: bool = False


@dataclass
class Node:
    """A command, or a construct of commands.

    Attributes:
        kind: ``command``, ``sequence`` (one after the other), ``pipeline``, ``maybe`` (behind && or
            ||), ``if`` (children: conditions and bodies in turn, then else), ``loop``, ``for``,
            ``case``, ``function``, ``group`` or ``subshell``.
        children: the nodes inside.
        name: of a function or of the variable of a for; of an if's condition, its text if it
            depends on variables alone; of a case's body, its pattern.
        words: of a command or a for.
        assignments: before a command, or of export and its like.
        here: texts that a command reads.
        redirected: whether its output goes into a file.
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
    """Returns the characters as a string; UNKNOWN stands where it is not known."""
    return "".join(char.c for char in chars)
