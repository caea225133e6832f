"""The state at a point of a shell script, and the expansion of words in that state."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_s3.launch.influence import Influence
from megatron_s3.launch.shell import (
    Argument,
    Assignment,
    Char,
    Literal,
    Node,
    Substitution,
    Variable,
    Word,
    value,
)

__all__ = ["Expansion", "State"]


@dataclass(frozen=True)
class State:
    """The variables and functions that are known at a point of the script.

    Attributes:
        variables: name -> arguments; a plain variable has exactly one.
        arrays: the names of variables that are arrays.
        exported: the names of variables that programs see.
        local: the names of variables that end with the current function.
        functions: name -> body.
        parameters: ``$1`` and on; None for those of the script, which are unknown.
        decided: text of a condition -> whether it holds in this branch.
    """

    variables: dict[str, tuple[Argument, ...]] = field(default_factory=dict)
    arrays: frozenset[str] = frozenset()
    exported: frozenset[str] = frozenset()
    local: frozenset[str] = frozenset()
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

    def returned(self, before: "State") -> "State":
        """Returns the state after a function that was called in the state ``before``."""
        after = self
        for name in self.local:
            if name in before.variables:
                after = after.put(name, before.variables[name], name in before.arrays)
            else:
                after = after.without(name)
        return replace(after, parameters=before.parameters, local=before.local)

    def look(self, influence: Influence) -> object:
        """Returns what tells the state apart from those of other paths, if there are many."""
        texts = {name: " ".join(map(value, found)) for name, found in self.variables.items()}
        looks = {name: influence.look(name, text) for name, text in texts.items()}
        return (
            {name: look for name, look in looks.items() if look},
            self.functions.keys(),
            self.local,
            self.parameters and list(map(value, self.parameters)),
        )

    def with_others(self, other: "State") -> "State":
        """Returns the state of two paths that look alike.

        A variable that only one of them has set has this value, and what they decided differently
        is undecided.
        """
        return replace(
            self,
            variables={**other.variables, **self.variables},
            arrays=self.arrays | {n for n in other.arrays if n not in self.variables},
            exported=self.exported | other.exported,
            decided=dict(self.decided.items() & other.decided.items()),
        )

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
        return _joined(self._fields(word, state, split=False))

    def expand(self, word: Word, state: State) -> list[Argument]:
        """Returns the arguments to which a word expands."""
        return self._fields(word, state, split=True)

    def assign(self, given: Assignment, state: State) -> State:
        """Returns the state after an assignment."""
        old = state.variables.get(given.name, ())
        if given.items is not None:
            found = tuple(item for word in given.items for item in self.expand(word, state))
            if any(re.match(r"\[[^]]*\]\+?=", value(item)) for item in found):  # ([3]=x)
                return state.without(given.name)
            return state.put(given.name, old + found if given.append else found, True)
        new = self.join(given.value, state)
        at = int(given.index or 0) if (given.index or "0").isdecimal() else len(old) + 1
        if at > len(old):
            return state.without(given.name)
        if given.append and at < len(old):
            new = old[at] + new
        array = given.index != "" or given.name in state.arrays
        return state.put(given.name, (*old[:at], new, *old[at + 1 :]), array)

    def with_defaults(self, word: Word, state: State) -> State:
        """Returns the state after ``${NAME:=WORD}`` in a word."""
        for part in word:
            if not isinstance(part, Variable) or "=" not in part.operator:
                continue
            if _lacks(part, self._held(part, state)):
                state = self.assign(Assignment(part.name, part.index, False, part.rest), state)
        return state

    def _fields(self, word: Word, state: State, split: bool) -> list[Argument]:
        fields: list[list[Char]] = [[]]
        for part in word:
            if isinstance(part, Substitution):
                if part.body:
                    self.follow(part.body, state)
                fields[-1].append(part.unknown)
            elif isinstance(part, Literal):
                self._append(fields, part.chars, part.quoted, split and not part.quoted)
            else:
                found, splits = self._value(part, state, split and not part.quoted)
                for number, item in enumerate(found):
                    if number:
                        fields.append([])
                    self._append(fields, item, part.quoted, splits)
        return [tuple(char for char in each if char.c) for each in fields if each]

    def _append(
        self, fields: list[list[Char]], item: Sequence[Char], quoted: bool, split: bool
    ) -> None:
        if quoted:
            fields[-1].append(Char("", 0, 0))  # an argument even if nothing is in it
        for char in item:
            if not split or char.c not in " \t\n":
                fields[-1].append(char)
            elif fields[-1]:
                fields.append([])

    def _value(self, part: Variable, state: State, split: bool) -> tuple[Sequence[Argument], bool]:
        """Returns a variable's texts, and whether they are split; characters get this place."""
        found, operator = self._held(part, state), part.operator
        lacks = _lacks(part, found)
        if operator == "?" or (found is None and not operator):
            return [(part.unknown,)], False
        if "+" in operator and found is not None and lacks:
            found = ()
        elif "+" in operator or (operator and lacks):
            found, split = self._fields(part.rest, state, split), False
        if part.quoted and part.index != "@":
            found = (_joined(found or ()),)
        place = (part.unknown.start, part.unknown.end)
        via = (place, *part.unknown.via)
        return [
            tuple(char._replace(via=char.via + via) for char in item) for item in found or ()
        ], split

    def _held(self, part: Variable, state: State) -> Sequence[Argument] | None:
        """Returns the elements of a variable that are asked for; None if they are unknown."""
        found: tuple[Argument, ...] | None
        if part.name == "@":
            return state.parameters
        if part.name.isdecimal() and part.name != "0":
            found, index = state.parameters, str(int(part.name) - 1)
        else:
            found, index = state.variables.get(part.name), part.index or "0"
        if found is None or part.index in ("@", "*"):
            return found
        return found[int(index) :][:1] if index.isdecimal() else None


def _lacks(part: Variable, found: Sequence[Argument] | None) -> bool:
    """Returns whether the word behind an operator is used instead of what was found."""
    return not found or (":" in part.operator and not any(found))


def _joined(items: Sequence[Argument]) -> Argument:
    """Returns arguments as one, with a blank between two."""
    chars: list[Char] = []
    for number, item in enumerate(items):
        at = item[0].start if item else 0
        chars += [Char(" ", at, at), *item] if number else item
    return tuple(chars)


def _names(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))
