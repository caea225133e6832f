"""The state at a point of a shell script, and the expansion of words in that state."""

import re
from dataclasses import dataclass, field, replace

from megatron_s3.launch.shell import (
    UNKNOWN,
    Argument,
    Char,
    Literal,
    Node,
    Substitution,
    Variable,
    Word,
)

__all__ = ["Expansion", "State"]


@dataclass(frozen=True)
class State:
    """The variables and functions that are known at a point of the script.

    Attributes:
        variables: name -> arguments; a plain variable has exactly one.
        arrays: the names of variables that are arrays.
        exported: the names of variables that programs see.
        functions: name -> body.
        parameters: ``$1`` and on; None for those of the script, which are unknown.
        decided: text of a condition -> whether it holds in this branch.
    """

    variables: dict[str, tuple[Argument, ...]] = field(default_factory=dict)
    arrays: frozenset[str] = frozenset()
    exported: frozenset[str] = frozenset()
    functions: dict[str, Node] = field(default_factory=dict)
    parameters: tuple[Argument, ...] | None = None
    decided: dict[str, bool] = field(default_factory=dict)

    def put(self, name: str, found: tuple[Argument, ...], array: bool) -> "State":
        """Returns the state after an assignment."""
        arrays = self.arrays | {name} if array else self.arrays - {name}
        variables = {**self.variables, name: found}
        return replace(self, variables=variables, arrays=arrays, decided=self._still(name))

    def without(self, name: str) -> "State":
        """Returns the state in which a variable is unknown."""
        kept = {k: v for k, v in self.variables.items() if k != name}
        arrays = self.arrays - {name}
        return replace(self, variables=kept, arrays=arrays, decided=self._still(name))

    def _still(self, name: str) -> dict[str, bool]:
        """Returns the conditions that stay decided when a variable changes."""
        return {text: holds for text, holds in self.decided.items() if name not in _names(text)}


class Expansion:
    """Expands the words of a script; each character keeps the places that it came from."""

    def follow(self, node: Node, state: State) -> None:
        """Follows the commands of a substitution."""
        raise NotImplementedError

    def join(self, word: Word, state: State) -> Argument:
        """Returns a word as one argument, as in an assignment."""
        chars: list[Char] = []
        for field_ in self._fields(word, state, split=False):
            chars += [Char(" ", field_[0].start, field_[0].start)] if chars and field_ else []
            chars += field_
        return tuple(chars)

    def expand(self, word: Word, state: State) -> list[Argument]:
        """Returns the arguments to which a word expands."""
        return self._fields(word, state, split=True)

    def _fields(self, word: Word, state: State, split: bool) -> list[Argument]:
        fields: list[list[Char]] = [[]]
        quoted = False
        for part in word:
            if isinstance(part, Literal):
                fields[-1] += part.chars
                quoted |= part.quoted
                continue
            if isinstance(part, Substitution):
                if part.body:
                    self.follow(part.body, state)
                fields[-1].append(_unknown(part, part.text))
                continue
            found, separate = self._value(part, state)
            quoted |= part.quoted and not separate
            if separate and part.quoted:
                if not found and len(word) == 1:
                    return []
                for number, item in enumerate(found):
                    if number:
                        fields.append([])
                    fields[-1] += item
                    quoted = True
            else:
                for number, item in enumerate(found):
                    if number:
                        fields.append([]) if split else fields[-1].append(Char(" ", *part.span))
                    self._append(fields, item, split and not part.quoted)
        kept = [tuple(each) for each in fields if each]
        return kept or ([()] if quoted or not split else [])

    def _append(self, fields: list[list[Char]], item: Argument, split: bool) -> None:
        for char in item:
            if not split or not char.c.isspace():
                fields[-1].append(char)
            elif fields[-1]:
                fields.append([])

    def _value(self, part: Variable, state: State) -> tuple[list[Argument], bool]:
        """Returns a variable's value, and whether it is a list; characters get this place."""
        via = (part.span, *part.at.via)
        found: tuple[Argument, ...] | None
        separate = part.index in ("@", "*")
        if part.name == "@":
            found, separate = state.parameters, True
        elif part.name.isdecimal() and part.name != "0":
            number = int(part.name) - 1
            given = state.parameters
            found = None if given is None else given[number : number + 1]
        else:
            found = state.variables.get(part.name)
            if found is not None and not separate:
                number = int(part.index) if part.index.isdecimal() else 0
                found = found[number : number + 1]
                if part.index and not part.index.isdecimal():
                    found = None
        operator = part.operator
        if operator == "?":
            found = None
        elif "+" in operator or (operator and (found is None or not any(found))):
            found, separate = (self.join(part.rest or [], state),), False
        if found is None:
            return [(_unknown(part, _written(part)),)], separate
        return [
            tuple(char._replace(via=char.via + via) for char in item) for item in found
        ], separate


def _names(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))


def _unknown(part: Variable | Substitution, text: str) -> Char:
    return Char(UNKNOWN, *part.span, part.at.via, text)


def _written(part: Variable) -> str:
    return f"${part.name}" if not part.operator and not part.index else f"${{{part.name}...}}"
