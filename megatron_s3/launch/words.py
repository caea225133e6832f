"""The words of a shell script: quotes, escapes, expansions and here-documents."""

import re
from collections.abc import Callable, Sequence

from megatron_s3.launch.shell import (
    Char,
    HereDocument,
    Literal,
    Node,
    ShellError,
    Substitution,
    Variable,
    Word,
    value,
)

__all__ = ["META", "OPERATORS", "Words"]

_BLANK = " \t"
#: Characters that end a word.
META = " \t\n;&|()<>"
OPERATORS = ("&&", "||", ";;&", ";;", ";&", "|&", "&>>", "&>", "&", "|", ";", "(", ")", "\n")


class Words:
    """Reads the words of a script, from the position ``at`` on.

    A word may contain commands; subclasses read them.
    """

    def __init__(self, chars: Sequence[Char]) -> None:
        self.chars = list(chars)
        self.text = value(chars)
        self.at = 0
        self.waiting: list[tuple[str, bool, HereDocument]] = []  # end, tabs, target

    def error(self, what: str) -> ShellError:
        """Returns an error at the current position."""
        place = self.chars[min(self.at, len(self.chars) - 1)].start if self.chars else 0
        return ShellError(what, place)

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

    def blank(self) -> None:
        """Skips blanks, continued lines and comments."""
        while self.at < len(self.text):
            if self.text[self.at] in _BLANK:
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif self.text[self.at] == "#" and (
                not self.at or self.text[self.at - 1] in META or self.text[self.at - 1] == "\n"
            ):
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return

    def peek(self) -> str:
        """Returns the next operator or reserved word; "" for another word or the end."""
        self.blank()
        for operator in OPERATORS:
            if self.text.startswith(operator, self.at):
                return operator
        found = re.compile(r"[^\s;&|()<>'\"\\$`]+").match(self.text, self.at)
        ends = found and (found.end() == len(self.text) or self.text[found.end()] in META)
        return found[0] if found and ends else ""

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
        return self.parts(lambda c: c in META)

    def parts(self, ends: Callable[[str], bool]) -> Word:
        """Reads a word up to a character that ends it."""
        parts: Word = []
        while self.at < len(self.text):
            c = self.text[self.at]
            if self.text.startswith("\\\n", self.at):
                self.at += 2
            elif c in "<>" and self.text.startswith("(", self.at + 1):
                parts.append(self.substitution(False))
            elif ends(c):
                break
            elif c == "\\":
                parts.append(Literal(self.chars[self.at + 1 : self.at + 2], True))
                self.at += 2
            elif c == "'":
                end = self.text.find("'", self.at + 1)
                if end < 0:
                    raise self.error("a quote is not closed")
                parts.append(Literal(self.chars[self.at + 1 : end], True))
                self.at = end + 1
            elif c == "$" and self.text.startswith("$'", self.at):
                parts.append(self.ansi())
            elif c == '"' or self.text.startswith('$"', self.at):
                self.at += 1 if c == '"' else 2
                parts += [Literal([], True), *self.double_quoted('"')]
                self.at += 1
            elif c in "$`":
                parts.append(self.expansion(False))
            else:
                self.literal(parts, False)
        return parts

    def literal(self, parts: Word, quoted: bool) -> None:
        """Reads a literal character."""
        char = self.chars[self.at]
        last = parts[-1] if parts else None
        if isinstance(last, Literal) and last.quoted == quoted and last.chars:
            last.chars.append(char)
        else:
            parts.append(Literal([char], quoted))
        self.at += 1

    def ansi(self) -> Literal:
        """Reads ``$'...'``."""
        chars = []
        start = self.at
        self.at += 2
        escapes = {"n": "\n", "t": "\t"}
        while not self.text.startswith("'", self.at):
            if self.at >= len(self.text):
                self.at = start
                raise self.error("a quote is not closed")
            char = self.chars[self.at]
            if char.c == "\\" and self.at + 1 < len(self.text):
                self.at += 1
                end = self.chars[self.at]
                char = char._replace(c=escapes.get(end.c, end.c), end=end.end)
            chars.append(char)
            self.at += 1
        self.at += 1
        return Literal(chars, True)

    def double_quoted(self, end: str | None) -> Word:
        """Reads up to the character ``end``, or to the end of the text if None."""
        parts: Word = []
        start = self.at
        while end is None or not self.text.startswith(end, self.at):
            if self.at >= len(self.text):
                if end is None:
                    break
                self.at = start
                raise self.error("a quote is not closed")
            c, following = self.text[self.at], self.text[self.at + 1 : self.at + 2]
            if c == "\\" and following == "\n":
                self.at += 2
            elif c == "\\" and following and following in '$`\\"' and (end or following != '"'):
                self.at += 1
                escaped = self.chars[self.at]
                self.chars[self.at] = escaped._replace(start=self.chars[self.at - 1].start)
                self.literal(parts, True)
            elif c in "$`":
                parts.append(self.expansion(True))
            else:
                self.literal(parts, True)
        return parts

    def expansion(self, quoted: bool) -> Literal | Variable | Substitution:
        """Reads an expansion that begins with ``$`` or a backtick."""
        at = self.chars[self.at]
        if at.c == "`":
            end = self.at + 1
            while end < len(self.text) and self.text[end] != "`":
                end += 2 if self.text[end] == "\\" else 1
            if end >= len(self.text):
                raise self.error("a backtick is not closed")
            start, self.at = self.at, end + 1
            body = type(self)(self.chars[start + 1 : end]).script()
            return self.substituted(body, start, quoted)
        if self.text.startswith("$((", self.at):
            return self.arithmetic(quoted)
        if self.text.startswith("$(", self.at):
            return self.substitution(quoted)
        if self.text.startswith("${", self.at):
            return self.braces(quoted)
        name = re.compile(r"[A-Za-z_]\w*|[0-9@*#?$!-]").match(self.text, self.at + 1)
        if not name:
            self.at += 1
            return Literal([at], quoted)
        self.at = name.end()
        span = (at.start, self.chars[self.at - 1].end)
        index = name[0] if name[0] in "@*" else ""
        return Variable("@" if index else name[0], index, "", None, quoted, at, span)

    def braces(self, quoted: bool) -> Variable:
        """Reads ``${...}``."""
        start = self.at
        at = self.chars[start]
        self.at += 2
        found = re.compile(r"([A-Za-z_]\w*|\d+|[@*])(\[([^]]*)\])?").match(self.text, self.at)
        if found:
            self.at = found.end()
        name = found[1] if found else "?"
        index = (found[3] or "") if found else ""
        if name in ("@", "*"):
            name, index = "@", name
        following = re.compile(r":?[-=+]").match(self.text, self.at) if found else None
        operator = following[0] if following else "" if found else "?"
        self.at += len(following[0]) if following else 0
        if not operator and not self.text.startswith("}", self.at):
            operator = "?"
        rest: Word = []
        while not self.text.startswith("}", self.at):
            if self.at >= len(self.text):
                self.at = start
                raise self.error("${ is not closed")
            if quoted:
                part = self.at
                rest += self.quoted_rest()
                if self.at == part:
                    break
            else:
                rest += self.parts(lambda c: c == "}")
        self.at += 1
        span = (at.start, self.chars[self.at - 1].end)
        return Variable(name, index, operator, rest or None, quoted, at, span)

    def quoted_rest(self) -> Word:
        """Reads up to ``}`` in ``"${NAME:-"``, and removes quotes."""
        parts: Word = []
        while self.at < len(self.text) and self.text[self.at] != "}":
            if self.text[self.at] == '"':
                self.at += 1
                parts += [Literal([], True), *self.double_quoted('"')]
                self.at += 1
            elif self.text[self.at] in "$`":
                parts.append(self.expansion(True))
            else:
                self.literal(parts, True)
        return parts

    def arithmetic(self, quoted: bool) -> Substitution:
        """Reads ``$((...))``, whose value is unknown."""
        start = self.at
        self.at += 1
        depth = 0
        while self.at < len(self.text):
            c = self.text[self.at]
            depth += (c == "(") - (c == ")")
            self.at += 1
            if not depth:
                break
        if depth:
            self.at = start
            raise self.error("$(( is not closed")
        return self.substituted(None, start, quoted)

    def substitution(self, quoted: bool) -> Substitution:
        """Reads ``$(...)``, or ``<(...)``."""
        start = self.at
        waiting, self.waiting = self.waiting, []
        self.at += 2
        body = self.sequence((")",))
        self.take(")")
        self.waiting = waiting
        return self.substituted(body, start, quoted)

    def substituted(self, body: Node | None, start: int, quoted: bool) -> Substitution:
        """Returns a substitution that was read, starting at ``start``."""
        at, text = self.chars[start], self.text[start : self.at]
        return Substitution(body, text, quoted, at, (at.start, self.chars[self.at - 1].end))
