"""The commands that a shell script starts on every path through it; none is executed.

Branches are both taken and not taken, loops run once, and functions are followed. A word of a
command is given as its characters after expansion, each with the places that it came from.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_s3.launch import grammar, shell
from megatron_s3.launch.expansion import Expansion, State
from megatron_s3.launch.influence import Influence
from megatron_s3.launch.shell import UNKNOWN, Argument, Char, HereDocument, LaunchError, Node, value

__all__ = ["Command", "Trace", "trace"]


_STATES = 64
_COMMANDS = 20_000
_DEPTH = 12
_SHELLS = {"sh", "bash", "dash", "zsh", "ksh"}
_PRINTS = {"echo", "printf", "logger", "print", ":"}
_WRITES = {"cat", "tee"}
_READS = {*_SHELLS, "sbatch", "srun", "ssh", "qsub", "bsub", "salloc"}


@dataclass(frozen=True)
class Command:
    """A command that is started.

    Attributes:
        words: its words after expansion.
        place: its place in the text.
        scripts: indices of words that hold commands, which are followed too.
        captured: whether its output becomes a part of a word, as in ``$(...)``.
    """

    words: tuple[Argument, ...]
    place: int
    scripts: frozenset[int]
    captured: bool = False

    @property
    def prints(self) -> bool:
        """Returns whether it only prints its words, or ignores them."""
        return value(self.words[0]).rpartition("/")[2] in _PRINTS


@dataclass(frozen=True)
class Trace:
    """The actions of a script.

    Attributes:
        commands: the commands that it starts on each path, in the order of the text.
        ends: the state at each of its ends.
        tree: its commands as they are written.
    """

    commands: tuple[Command, ...]
    ends: tuple[State, ...]
    tree: Node


def trace(text: str, flags: Sequence[str]) -> Trace:
    """Follows a script.

    If there are many paths, those that differ in nothing that influences these flags count as one.

    Args:
        text: the script.
        flags: names of flags.

    Raises:
        LaunchError: the text cannot be read, or there are too many paths through it.
    """
    tracer = _Tracer(Influence(text, flags))
    tree = grammar.parse(shell.characters(text))
    ends = tracer.run(tree, [State()])
    return Trace(tuple(tracer.commands), (*tracer.exits, *tracer.returns, *ends), tree)


def _decide(state: State, text: str, holds: bool) -> State:
    return replace(state, decided={**state.decided, text: holds})


class _Tracer(Expansion):
    def __init__(self, influence: Influence) -> None:
        self.influence, self.watched = influence, influence.watched
        self.commands: list[Command] = []
        self.exits: list[State] = []
        self.returns: list[State] = []
        self.depth = 0
        self.captured = False

    # Constructs.

    def run(self, node: Node, states: list[State]) -> list[State]:
        """Returns the states after a node; paths that end inside it (exit) are not included."""
        if not states:
            return []
        follow: Callable[[Node, list[State]], list[State]] = getattr(self, f"_{node.kind}")
        return self.fewer(follow(node, states), node)

    def fewer(self, states: list[State], node: Node) -> list[State]:
        """Merges states that are alike; conditions on which they differ become undecided."""
        many = len(states) > _STATES // 8
        unique: list[tuple[object, State]] = []
        for state in states:
            look = state.look(self.influence) if many else replace(state, decided={})
            for number, (other, kept) in enumerate(unique):
                if look == other:
                    unique[number] = (other, kept.with_others(state))
                    break
            else:
                unique.append((look, state))
        if len(unique) > _STATES:
            raise LaunchError("there are too many paths through the script", node.at)
        return [state for _, state in unique]

    def _sequence(self, node: Node, states: list[State]) -> list[State]:
        for child in node.children:
            states = self.run(child, states)
        return states

    def _maybe(self, node: Node, states: list[State]) -> list[State]:
        return [*states, *self._sequence(node, states)]

    def _subshell(self, node: Node, states: list[State]) -> list[State]:
        with self._apart():
            self._sequence(node, states)
        return states

    def follow(self, node: Node, state: State) -> None:
        outer, self.captured = self.captured, True
        try:
            self._subshell(node, [state])
        finally:  # commands that cannot be read may be passed over
            self.captured = outer

    def _pipeline(self, node: Node, states: list[State]) -> list[State]:
        here: list[HereDocument] = []
        for child in node.children:
            # cat <<END | sbatch
            child = replace(child, here=[*child.here, *here])
            here = child.here
            self._subshell(Node("sequence", [child]), states)
        return states

    def _if(self, node: Node, states: list[State]) -> list[State]:
        ended: list[State] = []
        bodies = list(node.children)
        while len(bodies) > 1:
            condition = bodies.pop(0)
            text = condition.name
            states = self.run(condition, states)
            if not text:
                ended += self.run(bodies.pop(0), states)
                continue
            holds = [s for s in states if s.decided.get(text, True)]
            states = [s for s in states if not s.decided.get(text, False)]
            ended += self.run(bodies.pop(0), [_decide(s, text, True) for s in holds])
            states = [_decide(s, text, False) for s in states]
        return [*ended, *(self.run(bodies[0], states) if bodies else states)]

    def _loop(self, node: Node, states: list[State]) -> list[State]:
        condition, body = node.children
        for _ in range(2):  # the second time with the variables that the body has set
            states = self.run(condition, states)
            states = [*states, *self.run(body, states)]
        return states

    def _for(self, node: Node, states: list[State]) -> list[State]:
        ended: list[State] = []
        for state in states:
            items = [item for word in node.words for item in self.expand(word, state)]
            if any(UNKNOWN in value(item) for item in items):
                items *= 2  # there may be more of them
            ways = [state]
            for item in items:
                ways = self.run(
                    node.children[0], [way.put(node.name, (item,), False) for way in ways]
                )
            ended += ways
        return ended

    def _case(self, node: Node, states: list[State]) -> list[State]:
        other = any(child.name == "*" for child in node.children)
        ended = [] if other else list(states)
        for child in node.children:
            ended += self.run(child, states)
        return ended

    def _function(self, node: Node, states: list[State]) -> list[State]:
        return [
            replace(state, functions={**state.functions, node.name: node.children[0]})
            for state in states
        ]

    # Commands.

    def _command(self, node: Node, states: list[State]) -> list[State]:
        return [after for state in states for after in self._simple(node, state)]

    def _simple(self, node: Node, state: State) -> list[State]:
        for each in (*node.words, *(given.value for given in node.assignments)):
            state = self.with_defaults(each, state)
        words = [word for each in node.words for word in self.expand(each, state)]
        name = value(words[0]) if words else ""
        with_them = state
        for given in node.assignments:
            with_them = self.assign(given, with_them)
        if not words:
            return [with_them]
        if name in grammar.DECLARE:
            names = {given.name for given in node.assignments}
            names |= {value(word) for word in words[1:] if not value(word).startswith("-")}
            flags = "".join(t for t in map(value, words[1:]) if re.match(r"-\w", t))
            exported = names if name == "export" or "x" in flags else set()
            local = set() if name in ("export", "readonly") or "g" in flags else names
            return [
                replace(
                    with_them,
                    exported=with_them.exported | exported,
                    local=with_them.local | local,
                )
            ]
        prefix = {given.name for given in node.assignments}
        seen = replace(with_them, exported=state.exported | prefix)
        if name in state.functions:
            return self._call(node, words, replace(seen, local=frozenset(prefix)), state)
        builtin = getattr(self, f"_do_{name}", None) if name.isalpha() else None
        if builtin:
            done: list[State] = builtin(node, words, state)
            return done
        self._start(node, words, seen)
        return [state]

    def _call(
        self, node: Node, words: Sequence[Argument], state: State, before: State
    ) -> list[State]:
        outer, self.returns = self.returns, []
        body = state.functions[value(words[0])]
        with self._deeper("functions", node):
            ended = self.run(body, [replace(state, parameters=tuple(words[1:]))])
        ended, self.returns = [*ended, *self.returns], outer
        return [each.returned(before) for each in ended]

    def _start(self, node: Node, words: list[Argument], state: State) -> None:
        texts = [value(word) for word in words]
        names = [text.rpartition("/")[2] for text in texts]
        scripts = {}
        for number, text in enumerate(texts) if names[0] not in _PRINTS else ():
            before = names[number - 1] if number else ""
            if re.fullmatch(r"-[a-z]*c", before) and _SHELLS & set(names[:number]):
                scripts[number] = words[number]
            elif self.watched(text) and re.search(r"\s", text):
                option = re.match(r"--[\w-]+=", text)
                scripts[number] = words[number][option.end() if option else 0 :]
        self.commands.append(Command(tuple(words), node.at, frozenset(scripts), self.captured))
        if len(self.commands) > _COMMANDS:
            raise LaunchError("the script starts too many commands", node.at)
        if names[0] in _PRINTS:
            return
        seen = state.exported - state.arrays
        child = State(
            {name: found for name, found in state.variables.items() if name in seen},
            exported=state.exported,
        )
        for word in scripts.values():
            self._inner(word, child, node)
        for here in node.here:
            text = value(here.chars)
            if not self.watched(text) and "$" not in text:
                continue
            written = names[0] in _WRITES and (node.redirected or names[0] == "tee")
            if written or _READS & set(names):
                body = (
                    tuple(here.chars)
                    if here.raw
                    else self.join(grammar.here_document(here.chars), state)
                )
                self._inner(body, child, node)

    def _inner(self, text: Sequence[Char], state: State, node: Node) -> None:
        """Follows a script inside a word or a here-document that a program runs."""
        with self._apart():
            self._script(text, replace(state, parameters=None), node, "in this text")

    def _script(self, text: Sequence[Char], state: State, node: Node, which: str) -> list[State]:
        """Returns the states after the commands of a text."""
        with self._deeper(f"commands {which}", node):
            try:
                return self.run(grammar.parse(text), [state])
            except LaunchError as error:
                if self.watched(value(text)):
                    raise LaunchError(
                        f"the commands {which} cannot be read ({error})", node.at
                    ) from error
                return [state]

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Follows another process, whose end is none of this script."""
        outer = self.exits, self.returns
        self.exits, self.returns = [], []
        try:
            yield
        finally:
            self.exits, self.returns = outer

    @contextlib.contextmanager
    def _deeper(self, what: str, node: Node) -> Iterator[None]:
        self.depth += 1
        if self.depth > _DEPTH:
            raise LaunchError(f"{what} call one another too deeply", node.at)
        try:
            yield
        finally:
            self.depth -= 1

    # Builtins.

    def _do_exit(self, node: Node, words: list[Argument], state: State) -> list[State]:
        self.exits.append(state)
        return []

    def _do_return(self, node: Node, words: list[Argument], state: State) -> list[State]:
        self.returns.append(state)
        return []

    def _do_exec(self, node: Node, words: list[Argument], state: State) -> list[State]:
        if len(words) < 2:
            return [state]
        self._start(node, words[1:], state)
        return self._do_exit(node, words, state)

    def _do_eval(self, node: Node, words: list[Argument], state: State) -> list[State]:
        text: list[Char] = []
        for word in words[1:]:
            last = word[-1] if word else Char(" ", 0, 0)
            text += [*word, Char(" ", last.end, last.end, last.via)]
        return self._script(text, state, node, "of eval")

    def _do_set(self, node: Node, words: list[Argument], state: State) -> list[State]:
        given = [value(word) for word in words]
        if "--" not in given:
            return [state]
        return [replace(state, parameters=tuple(words[given.index("--") + 1 :]))]

    def _do_shift(self, node: Node, words: list[Argument], state: State) -> list[State]:
        if state.parameters is None:
            return [state]
        given = value(words[1]) if len(words) > 1 else "1"
        many = int(given) if given.isdecimal() else 1
        return [replace(state, parameters=state.parameters[many:])]

    def _do_unset(self, node: Node, words: list[Argument], state: State) -> list[State]:
        for word in words[1:]:
            state = state.without(value(word).partition("[")[0])  # NAME[INDEX]
        return [state]

    _do_read = _do_mapfile = _do_readarray = _do_getopts = _do_unset
