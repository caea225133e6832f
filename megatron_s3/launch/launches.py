"""Launches of Megatron's trainer among the commands of a script, and their places in its text."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace

from megatron_s3.launch.expansion import State
from megatron_s3.launch.shell import UNKNOWN, Argument, Char, LaunchError, value
from megatron_s3.launch.trace import Command, Trace
from megatron_s3.paper import FLAGS

__all__ = ["Flag", "Launch", "find", "place", "shown"]

_PYTHON = re.compile(r"(.*/)?(python[\d.]*|pypy3?)")
_TORCHRUN = re.compile(r"(.*/)?(torchrun|debugpy-run)")
_DISTRIBUTED = re.compile(r"torch\.distributed\.(run|launch)")
# Modules that run the script that follows.
_RUNNERS = {
    "debugpy", "cProfile", "profile", "pdb", "trace", "coverage", "kernprof", "line_profiler",
    "scalene", "viztracer", "torch.utils.bottleneck", "memray", "accelerate.commands.launch",
}  # fmt: skip
_WITHOUT_VALUE = {
    "--standalone", "--no-python", "--no_python", "--run-path", "--run_path", "--use-env",
    "--use_env",
}  # fmt: skip
_PYTHON_WITH_VALUE = {"-X", "-W", "--check-hash-based-pycs"}


@dataclass(frozen=True)
class Flag:
    """A flag in a launch.

    Attributes:
        name: ``--lr``.
        word: the index of its word in the launch.
        key: the characters of its name.
        value: the characters of its value.
        joined: whether it is written as one word, ``--lr=VALUE``.
    """

    name: str
    word: int
    key: Argument
    value: Argument
    joined: bool


@dataclass(frozen=True)
class Launch:
    """A launch of the trainer.

    Attributes:
        words: the command after expansion.
        trainer: the index of the first word that names the program (``x.py``, or ``-m``); -1 for
            arguments without a program.
        arguments: the index of the first word behind the program.
        registered: whether the launch contains ``-m megatron_s3`` already.
        place: its position in the text; None if it is made from variables.
        bare: whether, on this path through the script, it has none of `FLAGS`.
    """

    words: tuple[Argument, ...]
    trainer: int
    arguments: int
    registered: bool
    place: int | None
    bare: bool = False

    @property
    def texts(self) -> list[str]:
        """The arguments as strings."""
        return [value(word) for word in self.words[self.arguments :]]

    def flags(self) -> list[Flag]:
        """Returns the flags of `FLAGS` in the launch, in order.

        Raises:
            LaunchError: one has no value.
        """
        found = []
        for number, word in enumerate(self.words[self.arguments :], self.arguments):
            name, equals, _ = value(word).partition("=")
            if name not in FLAGS:
                continue
            if equals:
                if len(word) == len(name) + 1:
                    raise LaunchError(f"{name} has no value", self.place)
                found.append(Flag(name, number, word[: len(name)], word[len(name) + 1 :], True))
                continue
            following = self.words[number + 1] if number + 1 < len(self.words) else ()
            if not following or value(following).startswith("--"):
                raise LaunchError(f"{name} has no value", self.place)
            found.append(Flag(name, number, word, following, False))
        return found


def shown(word: Argument) -> str:
    """Returns a word as a string, with the source text of unknown parts."""
    return "".join(char.name if char.c == UNKNOWN else char.c for char in word)


def find(found: Trace) -> list[Launch]:
    """Returns a script's launches, or its arguments alone if it starts nothing with them.

    Raises:
        LaunchError: a command has Megatron's flags, but the program that it starts is unknown.
    """
    commands = [command for command in found.commands if _has_flags(command.words)]
    started = [command for command in commands if not value(command.words[0]).startswith("-")]
    if started:
        launches = [_launch(command) for command in started if not command.prints]
        if launches:
            return [*launches, *_bare(found, launches)]
    alone = [command for command in found.commands if value(command.words[0]).startswith("-")]
    if alone and len(alone) == len(found.commands):
        words = tuple(word for command in alone for word in command.words)
        return [Launch(words, -1, 0, False, alone[0].place)]
    if any(_starts_python(command) for command in found.commands):
        return []  # variables are no launch if the script starts another program
    ends = [Launch(words, -1, 0, False, None) for words in map(_held, found.ends) if words]
    return [each for each in ends if each.flags()]


def _bare(found: Trace, launches: Sequence[Launch]) -> list[Launch]:
    """Returns the same launches on paths on which their flags come from elsewhere."""
    programs = {launch.words[launch.arguments - 1]: launch for launch in launches}
    bare = []
    for command in found.commands:
        if command.prints or _has_flags(command.words):
            continue
        for number, word in enumerate(command.words):
            same = programs.get(word)
            if same:
                start = number - (same.arguments - 1 - same.trainer)
                bare.append(
                    replace(
                        same,
                        words=command.words,
                        trainer=start,
                        arguments=number + 1,
                        place=command.place,
                        bare=True,
                    )
                )
                break
    return bare


def _starts_python(command: Command) -> bool:
    return not command.prints and any(
        _PYTHON.fullmatch(value(word)) or _TORCHRUN.fullmatch(value(word)) for word in command.words
    )


def _has_flags(words: Sequence[Argument]) -> bool:
    return any(value(word).partition("=")[0] in FLAGS for word in words)


def _held(state: State) -> tuple[Argument, ...]:
    """Returns the words in all variables that hold flags."""
    words: list[Argument] = []
    for items in state.variables.values():
        split: list[Argument] = []
        for item in items:
            groups = itertools.groupby(item, lambda char: char.c.isspace())
            split += [tuple(chars) for blank, chars in groups if not blank]
        if _has_flags(split):
            words += split
    return tuple(words)


def _launch(command: Command) -> Launch:
    texts = [value(word) for word in command.words]
    limit = next(i for i, text in enumerate(texts) if text.partition("=")[0] in FLAGS)
    launcher: int | None = None
    trainer: int | None = None
    torchrun = False
    at = 0
    while at < limit:
        text = texts[at]
        if launcher is None and at and texts[at - 1] == UNKNOWN:
            launcher = at - 1  # a variable that is not set in this text
        if _PYTHON.fullmatch(text) or _TORCHRUN.fullmatch(text):
            launcher, trainer, torchrun = at, None, bool(_TORCHRUN.fullmatch(text))
        elif text == "launch" and at and texts[at - 1].endswith("accelerate"):
            launcher, trainer, torchrun = at, None, True
        elif trainer is not None:
            pass
        elif text == "-c" and launcher is not None:
            break  # python -c: there is no program to register
        elif text in ("-m", "--module") and launcher is not None and at + 1 < limit:
            module = texts[at + 1]
            if _DISTRIBUTED.fullmatch(module) or module in _RUNNERS:
                torchrun, launcher = torchrun or bool(_DISTRIBUTED.fullmatch(module)), at + 1
            else:
                trainer = at
            at += 1
        elif text.endswith(".py") and not text.startswith("-"):
            trainer = at
            if launcher is None:
                raise LaunchError(
                    f"{shown(command.words[at])} is started by {shown(command.words[0])}, so -m "
                    "megatron_s3 cannot be put before it; start it with python or torchrun",
                    command.place,
                )
        at += 1
    if trainer is None and launcher is not None and texts[launcher] != UNKNOWN and at == limit:
        trainer = _first_positional(command, texts, launcher + 1, limit, torchrun)
    if trainer is None:
        raise LaunchError(
            f"{shown(command.words[0])} is given {texts[limit].partition('=')[0]}, but this text "
            "does not show which program it starts; convert the script that starts the trainer, "
            "or write out the command",
            command.place,
        )
    by_module = texts[trainer] in ("-m", "--module")
    name = texts[trainer + 1] if by_module else ""
    return Launch(
        command.words,
        trainer,
        trainer + 1 + by_module,
        name == "megatron_s3" or name.startswith("megatron_s3."),
        command.place,
    )


def _first_positional(
    command: Command, texts: list[str], start: int, limit: int, torchrun: bool
) -> int | None:
    """Finds a program of unknown name: the word that python or torchrun takes for it."""
    at = start
    while at < limit:
        text = texts[at]
        if text == "--":
            at += 1
            continue
        if not text.startswith("-"):
            name = shown(command.words[at])
            if UNKNOWN in text and re.search(r"ARG|OPT|CONF|DIST|FLAG", name.upper()):
                return None  # may also be more options
            return at
        takes = text not in _WITHOUT_VALUE if torchrun else text in _PYTHON_WITH_VALUE
        at += 2 if takes and "=" not in text else 1
    return None


def place(chars: Sequence[Char], beside: Char) -> tuple[int, int]:
    """Returns the place of characters at the level of the text that they share with another.

    For ``--lr $LR`` that is the place of ``$LR``, and not of the number where LR is set.

    Args:
        chars: characters of one word.
        beside: a character of another word, or of the same.
    """
    common = min(_common(char, beside) for char in (chars[0], chars[-1]))

    def level(char: Char) -> tuple[int, int]:
        return [(char.start, char.end), *char.via][len(char.via) - common]

    return level(chars[0])[0], level(chars[-1])[1]


def _common(char: Char, other: Char) -> int:
    """Returns how many places of expansion two characters share, counted from the outermost."""
    pairs = zip(reversed(char.via), reversed(other.via), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def unused(text: str, found: Trace, launches: Sequence[Launch]) -> int | None:
    """Returns the place of a flag that no command uses; None if there is none.

    It is ``--lr`` anywhere, or one of `FLAGS` that ``echo`` or ``printf`` puts into a word: what
    they print is not followed.
    """
    printed: set[int] = set()
    used = {char.start for launch in launches for word in launch.words for char in word}
    for command in found.commands:
        places = printed if command.captured and command.prints else used
        places |= {char.start for word in command.words for char in word}
    there = {char.start for char in _written(found.tree)}
    for flag in re.finditer(rf"(?<![\w-])(?:{'|'.join(FLAGS)})(?=[\s=\"'])", text):
        start = flag.start()
        if start in there - used and (flag[0] == "--lr" or start in printed):
            return start
    return None


def _written(part: object) -> Iterator[Char]:
    """Yields all characters of a tree's words; comments are not among them."""
    if isinstance(part, Char):
        yield part
    elif isinstance(part, list | tuple):
        for each in part:
            yield from _written(each)
    elif is_dataclass(part):
        yield from _written(list(vars(part).values()))
