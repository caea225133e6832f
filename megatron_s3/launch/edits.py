"""Replacement of an AdamW launch by an S3 launch in a script's text, and its check."""

import itertools
import re
from collections.abc import Sequence

from megatron_s3.errors import MegatronS3Error
from megatron_s3.launch.launches import Flag, Launch, find, place, shown
from megatron_s3.launch.shell import Char, LaunchError, value
from megatron_s3.launch.trace import Command, Trace
from megatron_s3.paper import Rules

__all__ = ["Edits", "WrongEdit", "compare", "line"]

_OURS = ("-m", "megatron_s3")


class WrongEdit(MegatronS3Error):
    """Raised if a launch would not become the expected one."""


def line(text: str, at: int | None) -> str:
    """Returns the "line N: " with which an error begins; empty for a text of one line."""
    if at is None:
        return ""
    return f"line {text.count(chr(10), 0, at) + 1}: " if "\n" in text.strip() else ""


class Edits:
    """Changes to a text, each with its reason.

    Args:
        where_set: whether a number is changed where its variable is set, instead of where it is
            used.
        beside_lr: whether flags are added behind --lr, instead of behind the program.
        outermost: whether -m megatron_s3 comes before the word of the command that names the
            program, instead of before the name where that is set.
    """

    def __init__(
        self, text: str, rules: Rules, where_set: bool, beside_lr: bool, outermost: bool
    ) -> None:
        self.text, self.rules = text, rules
        self.where_set, self.beside_lr, self.outermost = where_set, beside_lr, outermost
        self.changes: list[str] = []
        self._replaced: dict[tuple[int, int], str] = {}
        self._added: dict[int, dict[str, str]] = {}

    def launch(self, launch: Launch) -> None:
        """Changes a launch to one of S3."""
        flags = launch.flags()
        for flag in flags:
            old = value(flag.value)
            new, reason = self.rules.new(flag.name, old)
            if new is None:
                self._drop(flag, reason)
            elif new != old:
                constant = flag.name in ("--optimizer", "--clip-grad")
                span = None if constant or not self.where_set else _one_place(flag.value)
                if span is None:
                    span = place(flag.value, flag.key[0])
                change = f"{flag.name} {shown(flag.value)} -> {new}: {reason}"
                self._replace(self._with_quotes(span), new, change)
        names = {flag.name for flag in flags}
        added = [] if launch.bare else list(self.rules.missing(names))
        rates = [flag for flag in flags if flag.name == "--lr"]
        if added:
            if rates and (self.beside_lr or launch.trainer < 0):
                last = rates[-1]
                span = place(last.value, last.key[0])
                at = self._with_quotes(span)[1]
            elif launch.trainer >= 0:
                word = launch.words[launch.arguments - 1]
                beside = launch.words[launch.trainer - 1]
                span = place(word, beside[0]) if beside else place(word, word[0])
                at = self._with_quotes(span)[1]
            else:
                at = len(self.text.rstrip())
            for name, number, reason in added:
                self._added.setdefault(at, {})[name] = number
                self._say(f"{name} {number} added: {reason}")
        if launch.trainer >= 0 and not launch.registered:
            self._register(launch)

    def _register(self, launch: Launch) -> None:
        word, before = launch.words[launch.trainer], launch.words[max(launch.trainer - 1, 0)]
        start, end = place(word, before[0] if self.outermost and before else word[0])
        if self.outermost:
            start = self._with_quotes((start, end))[0]
        new = "-m megatron_s3 "
        if not self.outermost and self.text[start - 1 : start] == "=":  # S=train.py
            new = f'"{new}'
            self._replace((end, end), '"', "")
        program = shown(word if value(word) != "-m" else launch.words[launch.trainer + 1])
        self._replace(
            (start, start),
            new,
            f"-m megatron_s3 before {program}: registers S3 in Megatron-LM, whose files stay "
            "unchanged (the patch in patches/ does the same)",
        )

    def _with_quotes(self, span: tuple[int, int]) -> tuple[int, int]:
        start, end = span
        around = self.text[start - 1 : start], self.text[end : end + 1]
        if around[0] and around[0] == around[1] and around[0] in "\"'":
            return start - 1, end + 1
        return span

    def _replace(self, span: tuple[int, int], new: str, change: str) -> None:
        if self._replaced.setdefault(span, new) != new:
            raise WrongEdit(
                f"{line(self.text, span[0])}{self.text[slice(*span)] or 'this place'} would have "
                f"to become {self._replaced[span]} and {new}"
            )
        self._say(change)

    def _say(self, change: str) -> None:
        self.changes += [each for each in change.splitlines() if each and each not in self.changes]

    def _drop(self, flag: Flag, reason: str) -> None:
        key = self._with_quotes(place(flag.key, flag.value[0]))
        number = self._with_quotes(place(flag.value, flag.key[0]))
        if flag.joined:
            spans = [self._with_quotes((key[0], number[1]))]
        else:
            spans = [key, number]
            between = self.text[key[1] : spans[1][0]]
            if not between.replace("\\\n", "").strip():
                spans = [(key[0], spans[1][1])]
        for start, end in spans:
            self._replace(self._whole(start, end), "", "")
        self._say(f"{flag.name} {shown(flag.value)} removed: {reason}")

    def _whole(self, start: int, end: int) -> tuple[int, int]:
        """Returns a place with the blanks before it, or its whole line if nothing else is on it."""
        begin = self.text.rfind("\n", 0, start) + 1
        after = re.compile(r"[ \t]*(\\?)\n").match(self.text, end)
        continued = self.text[:begin].endswith("\\\n")
        if not self.text[begin:start].strip() and after and (after[1] or not continued):
            return begin, after.end()
        while start > 0 and self.text[start - 1] in " \t":
            start -= 1
        return start, end

    def result(self) -> str:
        """Returns the text with all changes.

        Raises:
            WrongEdit: two of them overlap.
        """
        text = self.text
        for at, flags in self._added.items():
            self._replaced[at, at] = "".join(f" {flag} {new}" for flag, new in flags.items())
        spans = sorted(self._replaced, reverse=True)
        for (start, _), (_, end) in itertools.pairwise(spans):
            if end > start:
                raise WrongEdit(f"{line(text, start)}two changes overlap")
        # From the end, so that earlier places stay valid. At one place, text is inserted before the
        # replacement of what ends there.
        for start, end in spans:
            text = text[:start] + self._replaced[start, end] + text[end:]
        return text


def _one_place(chars: Sequence[Char]) -> tuple[int, int] | None:
    """Returns the place of characters that are adjacent; None for others."""
    if not chars:
        return None
    together = all(
        one.via == other.via and one.end == other.start for one, other in itertools.pairwise(chars)
    )
    return (chars[0].start, chars[-1].end) if together else None


def compare(before: Trace, after: Trace, rules: Rules) -> list[str]:
    """Compares what a changed script starts with what it must start.

    Returns:
        Changes other than those of the launches' flags: names that contain a changed number.

    Raises:
        WrongEdit: something is different.
    """
    if len(before.commands) != len(after.commands):
        raise WrongEdit("other commands would be started")
    notes: list[str] = []
    old_launches = {id(launch.words): launch for launch in find(before)}
    try:
        new_launches = {id(launch.words): launch for launch in find(after)}
    except LaunchError as error:
        raise WrongEdit(str(error)) from error
    alone = [launch for launch in old_launches.values() if launch.trainer < 0]
    if alone:
        olds, news = list(old_launches.values()), list(new_launches.values())
        if len(olds) != len(news):
            raise WrongEdit("the arguments would be different")
        for launch, became in zip(olds, news, strict=True):
            _compare_launch(launch, became, rules, notes)
        return notes
    for old, new in zip(before.commands, after.commands, strict=True):
        starts, will_start = old_launches.get(id(old.words)), new_launches.get(id(new.words))
        if starts and will_start:
            _compare_launch(starts, will_start, rules, notes)
        elif starts or will_start:
            raise WrongEdit("another launch would be started")
        elif not old.prints:
            if old.scripts != new.scripts:
                raise WrongEdit("other commands would be started")
            # Commands inside a word are compared separately.
            _compare_words(_plain_words(old), _plain_words(new), notes)
    return notes


def _plain_words(command: Command) -> list[str]:
    return [value(word) for n, word in enumerate(command.words) if n not in command.scripts]


def _compare_launch(old: Launch, new: Launch, rules: Rules, notes: list[str]) -> None:
    texts = [[value(word) for word in launch.words] for launch in (old, new)]
    front = texts[0][: max(old.trainer, 0)]
    program = texts[0][max(old.trainer, 0) : old.arguments]
    if old.trainer >= 0 and not old.registered:
        program = [*_OURS, *program]
    size = len(front) + len(program)
    if texts[1][:size] != [*front, *program]:
        raise WrongEdit(f"{' '.join(program)} would not be started")
    given = {flag.word: flag for flag in old.flags()}
    wanted: list[str] = []
    last: dict[str, str] = {}
    number = old.arguments
    while number < len(texts[0]):
        flag = given.get(number)
        if not flag:
            wanted.append(texts[0][number])
        else:
            was = value(flag.value)
            became, _ = rules.new(flag.name, was)
            if became is not None:
                wanted += [f"{flag.name}={became}"] if flag.joined else [flag.name, became]
                last[flag.name] = became
            number += not flag.joined
        number += 1
    names = {flag.name for flag in given.values()}
    added = [] if old.bare else list(rules.missing(names))
    last |= {name: new_value for name, new_value, _ in added}
    got = texts[1][size:]
    # Flags that other launches need at a shared place may be present too, if they have no effect.
    for pair in added:
        if not _remove(got, list(pair[:2])):
            raise WrongEdit(f"{pair[0]} {pair[1]} would be missing")
    for name, new_value, _ in rules.missing(set()):
        if len(got) > len(wanted):
            _remove(got, [name, new_value])
    _compare_words(wanted, got, notes)
    words = tuple(tuple(Char(c, 0, 0) for c in word) for word in texts[1])
    found = {f.name: value(f.value) for f in Launch(words, -1, size, True, None).flags()}
    if any(found.get(name) != wanted_value for name, wanted_value in last.items()):
        raise WrongEdit("an added flag would override a given one")


def _remove(words: list[str], pair: list[str]) -> bool:
    for at in range(len(words) - 1):
        if words[at : at + 2] == pair:
            del words[at : at + 2]
            return True
    return False


def _compare_words(wanted: list[str], got: list[str], notes: list[str]) -> None:
    if len(wanted) != len(got):
        raise WrongEdit("other words would change")
    for one, other in zip(wanted, got, strict=True):
        if one == other:
            continue
        numbers = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
        plain = numbers.fullmatch(one) or numbers.sub("", one) != numbers.sub("", other)
        if plain or one.startswith("-"):
            raise WrongEdit(f"{one[:60]} would become {other[:60]}")
        note = f"{one} -> {other}: the name contains a number that changes"
        notes += [note] if note not in notes else []
