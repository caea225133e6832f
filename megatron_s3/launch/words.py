"""The words of a shell script: quotes, escapes, expansions and here-documents."""

import re
from collections.abc import Sequence

from megatron_s3.launch.shell import (
    UNKNOWN,
    Char,
    HereDocument,
    LaunchError,
    Literal,
    Node,
    Substitution,
    Variable,
    Word,
    value,
)

__all__ = ["META", "Words"]

_OPERATORS = ("&&", "||", ";;&", ";;", ";&", "|&", "&>>", "&>", "&", "|", ";", "(", ")", "\n")
#: Characters that end a word.
META = " \t\n;&|()<>"
_BLANKS = re.compile(r"(?:[ \t]|\\\n|#.*)*")
_TOKEN = re.compile(rf"{'|'.join(map(re.escape, _OPERATORS))}|[^\s;&|()<>'\"\\$`]+(?=[{META}]|\Z)")
_PLAIN = re.compile(r"[\w./=,:%@+-]+")
_SINGLE_QUOTED = re.compile(r"'([^']*)'")
_ANSI_QUOTED = re.compile(r"\$'((?:[^'\\]|\\.)*)'", re.DOTALL)
_BACKTICKS = re.compile(r"`((?:[^`\\]|\\.)*)`", re.DOTALL)
# What a character behind a backslash stands for; the codes of characters are not read.
_IN_BACKTICKS = {c: c for c in "$`\\"}
_IN_ANSI = {c: c for c in "\\'\""} | {"n": "\n", "t": "\t"} | dict.fromkeys("cuUx01234567", UNKNOWN)
_PARAMETER = re.compile(r"\$([A-Za-z_]\w*|[0-9@*#?$!-])")
_IN_BRACES = re.compile(r"([A-Za-z_]\w*|\d+|[@*])(?:\[([^]]*)\])?(:?[-=+])?")


class Words:
    """Reads the words of a script, from the position ``at`` on.

    A word may contain commands; subclasses read them.
    """

    def __init__(self, chars: Sequence[Char]) -> None:
        self.chars = list(chars)
        self.text = value(chars)
        self.at = 0
        self.waiting: list[tuple[str, bool, HereDocument]] = []  # end, tabs, target

    def error(self, what: str) -> LaunchError:
        """Returns an error at the current position."""
        place = self.chars[min(self.at, len(self.chars) - 1)].start if self.chars else 0
        return LaunchError(what, place)

    def sequence(self, ends: Sequence[str]) -> Node:
        """Reads the commands up to one of the words or operators ``ends``, and leaves that."""
        raise NotImplementedError

    def script(self) -> Node:
        """Reads all commands of the text."""
        found = self.sequence(())
        if self.at < len(self.text):
            raise self.error(f"unexpected {self.text[self.at]!r}")
        return found

    # Tokens.

    def skip(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Consumes what the pattern matches at the current position, if anything."""
        found = pattern.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found

    def blank(self) -> None:
        """Skips blanks, continued lines and comments."""
        self.skip(_BLANKS)

    def peek(self) -> str:
        """Returns the next operator or reserved word; "" for another word or the end."""
        self.blank()
        found = _TOKEN.match(self.text, self.at)
        return found[0] if found else ""

    def take(self, token: str) -> None:
        """Consumes an operator or a reserved word, which must be there."""
        if self.peek() != token:
            what = self.peek() or self.text[self.at : self.at + 10] or "the end"
            raise self.error(f"{what!r} where {token!r} is expected")
        self.at += len(token)
        if token == "\n":
            self.here_documents()

    def newlines(self) -> None:
        """Skips empty lines."""
        while self.peek() == "\n":
            self.take("\n")

    def here_documents(self) -> None:
        """Reads the here-documents that begin in the next line."""
        for end, tabs, document in self.waiting:
            indent = r"\t*" if tabs else ""
            line = re.compile(rf"^{indent}{re.escape(end)}$\n?", re.MULTILINE)
            found = line.search(self.text, self.at)
            stop, after = found.span() if found else (len(self.text), len(self.text))
            document.chars, self.at = self.chars[self.at : stop], after
        self.waiting = []

    # Words.

    def word(self) -> Word:
        """Reads the next word; the list is empty if there is none."""
        self.blank()
        return self.parts(META)

    def parts(self, ends: str, quoted: bool = False) -> Word:
        """Reads up to one of the characters ``ends``, or to the end of the text.

        Args:
            ends: the characters; "" for a here-document.
            quoted: whether the text is in double quotes or in a here-document.
        """
        parts: Word = []
        escapes = "$`\\" + ends + ('"' if ends else "")
        while self.at < len(self.text):
            c, following = self.text[self.at], self.text[self.at + 1 : self.at + 2]
            if c in "<>" and following == "(" and not quoted:
                parts.append(self.substitution())
            elif c in ends:
                break
            elif c == "\\" and following == "\n":
                self.at += 2
            elif c == "\\" and (not quoted or (following and following in escapes)):
                start, escaped = self.chars[self.at].start, self.chars[self.at + 1 : self.at + 2]
                parts.append(Literal([char._replace(start=start) for char in escaped], True))
                self.at += 2
            elif c == "'" and not quoted:
                parts.append(Literal(self.inside(_SINGLE_QUOTED, "a quote is not closed"), True))
            elif c == "$" and following == "'" and not quoted:
                chars = self.inside(_ANSI_QUOTED, "a quote is not closed")
                parts.append(Literal(_unescaped(chars, _IN_ANSI), True))
            elif c == "$" and following == '"' and not quoted:
                self.at += 1
            elif c == '"' and ends:
                parts += self.double_quoted()
            elif c in "$`":
                parts.append(self.expansion(quoted))
            else:
                start = self.at
                if not self.skip(_PLAIN):
                    self.at += 1
                parts.append(Literal(self.chars[start : self.at], quoted))
        return parts

    def inside(self, pattern: re.Pattern[str], what: str) -> list[Char]:
        """Reads a text in quotes, and returns the characters between them."""
        found = self.skip(pattern)
        if not found:
            raise self.error(what)
        return self.chars[found.start(1) : found.end(1)]

    def close(self, end: str, start: int, what: str) -> None:
        """Consumes the character that closes what begins at ``start``."""
        if not self.text.startswith(end, self.at):
            self.at = start
            raise self.error(what)
        self.at += 1

    def double_quoted(self) -> Word:
        """Reads ``"..."``."""
        start = self.at
        self.at += 1
        parts = self.parts('"', True)
        self.close('"', start, "a quote is not closed")
        return parts or [Literal([], True)]

    def expansion(self, quoted: bool) -> Literal | Variable | Substitution:
        """Reads an expansion that begins with ``$`` or a backtick."""
        start = self.at
        if self.text.startswith("`", start):
            chars = self.inside(_BACKTICKS, "a backtick is not closed")
            body = type(self)(_unescaped(chars, _IN_BACKTICKS)).script()
            return Substitution(body, self.unknown(start))
        if self.text.startswith(("$((", "$["), start):
            self.arithmetic("()" if self.text.startswith("$(", start) else "[]")
            return Substitution(None, self.unknown(start))
        if self.text.startswith("$(", start):
            return self.substitution()
        if self.text.startswith("${", start):
            return self.braces(quoted)
        found = self.skip(_PARAMETER)
        if not found:
            self.at += 1
            return Literal(self.chars[start : self.at], quoted)
        return self.variable(found[1], "", "", [], quoted, start)

    def braces(self, quoted: bool) -> Variable:
        """Reads ``${...}``."""
        start = self.at
        self.at += 2
        found = self.skip(_IN_BRACES)
        name, index, operator = found.groups("") if found else ("?", "", "?")
        if not operator and not self.text.startswith("}", self.at):
            operator = "?"
        rest = self.parts("}", quoted)
        self.close("}", start, "${ is not closed")
        return self.variable(name, index, operator, rest, quoted, start)

    def variable(
        self, name: str, index: str, operator: str, rest: Word, quoted: bool, start: int
    ) -> Variable:
        """Returns a variable that was read."""
        if name in "@*":
            name, index = "@", name
        return Variable(name, index, operator, rest, quoted, self.unknown(start))

    def arithmetic(self, brackets: str = "()") -> None:
        """Skips ``((...))`` or ``[...]``, and the ``$`` before it."""
        depth = 0
        for found in re.compile(f"[{re.escape(brackets)}]").finditer(self.text, self.at):
            depth += 1 if found[0] == brackets[0] else -1
            if not depth:
                self.at = found.end()
                return
        raise self.error("$(( is not closed")

    def substitution(self) -> Substitution:
        """Reads ``$(...)``, or ``<(...)``."""
        start = self.at
        waiting, self.waiting = self.waiting, []
        self.at += 2
        body = self.sequence((")",))
        self.take(")")
        self.waiting = waiting
        return Substitution(body, self.unknown(start))

    def unknown(self, start: int) -> Char:
        """Returns the character for the unknown value of an expansion that was read."""
        first, last = self.chars[start], self.chars[self.at - 1]
        return Char(UNKNOWN, first.start, last.end, first.via, self.text[start : self.at])


def _unescaped(chars: Sequence[Char], escapes: dict[str, str]) -> list[Char]:
    """Returns characters without the backslashes before characters in ``escapes``."""
    found = []
    rest = iter(chars)
    for char in rest:
        if char.c == "\\":
            quoted = next(rest)
            if quoted.c in escapes:
                char = char._replace(c=escapes[quoted.c], end=quoted.end, name=f"\\{quoted.c}")
            else:
                found.append(char)
                char = quoted
        found.append(char)
    return found
