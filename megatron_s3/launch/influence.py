"""The parts of a shell script that can influence some flags of the launches in it."""

import re
from collections.abc import Sequence

__all__ = ["Influence"]

_PROGRAM = r"\S+\.py\b|\btorchrun\b|\bpython[\d.]*\b|(?<![\w-])-m\s+\S+"
_NAME = re.compile(r"\$\{?[!#]?(\w+|[@*])")
#: Where a variable is given a value: NAME=, NAME+=, NAME[0]=, ${NAME:=; for NAME in.
_GIVEN = re.compile(r"(?<![\w$-])(\w+)(?:\[[^]]*\])?\+?=|\$\{(\w+):?=|\bfor\s+(\w+)\s+in\b")
#: Where the name of a variable is that of another's value.
_DYNAMIC = re.compile(r"\$\{!|(?<![^\s\"';])\$\{?\w+\}?\+?=")
#: A value that is written out.
_WORD = r"[\w.+-]+(?![^\s\"')\\;|&])"
#: A word behind an operator takes the place of the value, depending on whether there is one.
_ASKED = re.compile(r"\$\{(\w+)(?:\[[^]]*\])?:?[-=+?]")
# A number that may become the value of a flag through other variables.
_RATE = re.compile(r"(?<![\w./-])(?:\d*\.\d+|\d+\.?(?=[eE]))(?:[eE][-+]?\d+)?(?![\w./])")


class Influence:
    """The influence of a script's variables on flags, and on the programs that are given them.

    Args:
        text: the script.
        flags: names of flags.

    Attributes:
        names: the variables whose values can become a flag's value, also through others.
        asked: the variables of which the script asks whether they are set.
    """

    def __init__(self, text: str, flags: Sequence[str]) -> None:
        flag = rf"(?<![\w-])(?:{'|'.join(map(re.escape, flags))})(?![\w-])"
        self._watched = re.compile(rf"{flag}(?:[ =]\S+)?|{_PROGRAM}")
        visible = rf"(?:{flag}|(?<![\w-])-m)[\"']?(?:[= \t]|\\\n)+[\"']?(?:{_NAME.pattern}|{_WORD})"
        values = list(re.finditer(visible, text))
        self.asked = frozenset(_ASKED.findall(text))
        self.names = _closure({value[1] for value in values if value[1]}, text)
        # Parameters of functions, names that are put together, and a flag without its value beside
        # it: any number may become the value of a flag.
        self._anything = (
            bool(_DYNAMIC.search(text))
            or any(not re.match(r"[A-Za-z_]", name) for name in self.names)
            or bool({f.start() for f in re.finditer(flag, text)} - {v.start() for v in values})
        )

    def watched(self, text: str) -> list[str]:
        """Returns the flags with their values, and the programs, that are named in a text."""
        found: list[str] = self._watched.findall(text)
        return found

    def look(self, name: str, text: str) -> object:
        """Returns what of a variable's value can influence the flags; nothing if it cannot.

        Args:
            name: the variable.
            text: its value.
        """
        if name in self.names:
            return (text,)
        found = [*self.watched(text), *(_RATE.findall(text) if self._anything else ())]
        return found or name in self.asked


def _closure(names: set[str], text: str) -> frozenset[str]:
    """Returns the names, and those of the variables of which they are made.

    The value of a variable is taken to reach to the next place where one is given a value, so that
    it does not matter how the text is quoted.
    """
    made_of: dict[str, set[str]] = {}
    places = list(_GIVEN.finditer(text))
    ends = [given.start() for given in places[1:]] + [len(text)]
    for given, end in zip(places, ends, strict=False):
        name = given[1] or given[2] or given[3]
        made_of.setdefault(name, set()).update(_NAME.findall(text[given.end() : end]))
    todo, found = list(names), set(names)
    while todo:
        more = made_of.get(todo.pop(), set()) - found
        found |= more
        todo += more
    return frozenset(found)
