"""The part of the shell's grammar that launch scripts are written in.

Nothing is run.  What this grammar does not have is an error.
"""

import re
from collections.abc import Callable, Sequence

from megatron_s3.launch.shell import (
    Assignment,
    Char,
    Literal,
    Node,
    ShellError,
    Substitution,
    Variable,
    Word,
    value,
)

__all__ = ["here_document", "parse"]

_BLANK = " \t"
_META = " \t\n;&|()<>"
_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(\[[^]]*\])?\+?=")
_OPERATORS = ("&&", "||", ";;&", ";;", ";&", "|&", "&>>", "&>", "&", "|", ";", "(", ")", "\n")
_REDIRECTION = re.compile(r"(\d+|\{\w+\})?(<<<|<<-|<<|<>|<&|>&|>>|>\||<(?!\()|>(?!\()|&>>|&>)")
# Of a condition, what may change although no variable of a name does.
_CHANGES = re.compile(r"[`\n;]|\$\(|\$\{?[?@*#0-9]|\]\s*(&&|\|\|)|\s-(?![nzv]\s)[a-zA-Z]\s")
_DECLARE = {"export", "declare", "local", "readonly", "typeset"}
_ENDS = {"then", "do", "done", "fi", "else", "elif", "esac", "}"}


def parse(chars: Sequence[Char]) -> Node:
    """The commands of a script.

    Raises:
        ShellError: it is no shell script.
    """
    parser = _Parser(chars)
    found = parser.sequence(())
    if parser.at < len(parser.text):
        raise parser.error(f"unexpected {parser.text[parser.at]!r}")
    return found


def here_document(chars: Sequence[Char]) -> Word:
    """The text of a ``<<`` whose expansions are made."""
    return _Parser(chars).double_quoted(None)


class _Parser:
    def __init__(self, chars: Sequence[Char]) -> None:
        self.chars = list(chars)
        self.text = value(chars)
        self.at = 0
        self.waiting: list[tuple[str, bool, bool, list]] = []  # here-documents: end, tabs, raw, to

    def error(self, what: str) -> ShellError:
        place = self.chars[min(self.at, len(self.chars) - 1)].start if self.chars else 0
        return ShellError(what, place)

    # Tokens.

    def blank(self) -> None:
        while self.at < len(self.text):
            if self.text[self.at] in _BLANK:
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif self.text[self.at] == "#" and (
                not self.at or self.text[self.at - 1] in _META or self.text[self.at - 1] == "\n"
            ):
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return

    def peek(self) -> str:
        """The operator or the reserved word that comes next; empty for another word or the end."""
        self.blank()
        for operator in _OPERATORS:
            if self.text.startswith(operator, self.at):
                return operator
        found = re.compile(r"[^\s;&|()<>'\"\\$`]+").match(self.text, self.at)
        ends = found and (found.end() == len(self.text) or self.text[found.end()] in _META)
        return found[0] if found and ends else ""

    def take(self, token: str) -> None:
        if self.peek() != token:
            what = self.peek() or self.text[self.at : self.at + 10] or "the end"
            raise self.error(f"{what!r} where {token!r} has to be")
        self.at += len(token)
        if token == "\n":
            self.here_documents()

    def newlines(self) -> None:
        while self.peek() == "\n":
            self.take("\n")

    def here_documents(self) -> None:
        for end, tabs, raw, where in self.waiting:
            start = self.at
            while True:
                if self.at >= len(self.text):
                    line_end = stop = self.at
                    break
                line_end = self.text.find("\n", self.at)
                line_end = len(self.text) if line_end < 0 else line_end
                line = self.text[self.at : line_end]
                if (line.lstrip("\t") if tabs else line) == end:
                    stop = self.at
                    break
                self.at = line_end + 1
            self.at = min(line_end + 1, len(self.text))
            where.extend([self.chars[start:stop], raw])
        self.waiting = []

    # Words.

    def word(self) -> Word:
        """The next word; an empty list if there is none."""
        self.blank()
        return self.parts(lambda c: c in _META)

    def parts(self, ends: Callable[[str], bool]) -> Word:
        parts: Word = []
        while self.at < len(self.text):
            c = self.text[self.at]
            if self.text.startswith("\\\n", self.at):
                self.at += 2
            elif c in "<>" and self.text.startswith("(", self.at + 1):
                parts.append(self.substitution(self.at + 2, False))
            elif ends(c):
                break
            elif c == "\\":
                parts.append(Literal(self.chars[self.at + 1 : self.at + 2], True))
                self.at += 2
            elif c == "'":
                end = self.text.find("'", self.at + 1)
                if end < 0:
                    raise self.error("a quote without its end")
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
        char = self.chars[self.at]
        last = parts[-1] if parts else None
        if isinstance(last, Literal) and last.quoted == quoted and last.chars:
            last.chars.append(char)
        else:
            parts.append(Literal([char], quoted))
        self.at += 1

    def ansi(self) -> Literal:
        chars = []
        start = self.at
        self.at += 2
        escapes = {"n": "\n", "t": "\t"}
        while not self.text.startswith("'", self.at):
            if self.at >= len(self.text):
                self.at = start
                raise self.error("a quote without its end")
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
        """Up to the character ``end``, which is left; up to the end of the text if None."""
        parts: Word = []
        start = self.at
        while end is None or not self.text.startswith(end, self.at):
            if self.at >= len(self.text):
                if end is None:
                    break
                self.at = start
                raise self.error("a quote without its end")
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
        at = self.chars[self.at]
        if at.c == "`":
            end = self.at + 1
            while end < len(self.text) and self.text[end] != "`":
                end += 2 if self.text[end] == "\\" else 1
            if end >= len(self.text):
                raise self.error("a ` without its end")
            inside = self.chars[self.at + 1 : end]
            text = self.text[self.at : end + 1]
            self.at = end + 1
            return Substitution(parse(inside), text, quoted, at, (at.start, self.chars[end].end))
        if self.text.startswith("$((", self.at):
            return self.arithmetic(quoted)
        if self.text.startswith("$(", self.at):
            return self.substitution(self.at + 2, quoted)
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
        operator = re.compile(r":?[-=+]|").match(self.text, self.at)[0] if found else "?"
        self.at += len(operator) if found else 0
        if not operator and not self.text.startswith("}", self.at):
            operator = "?"
        rest: Word = []
        while not self.text.startswith("}", self.at):
            if self.at >= len(self.text):
                self.at = start
                raise self.error("a ${ without its end")
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
        """In ``"${NAME:-"`` up to ``}``: text, in which quotes are taken away."""
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
        start, at = self.at, self.chars[self.at]
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
            raise self.error("a $(( without its end")
        text = self.text[start : self.at]
        return Substitution(None, text, quoted, at, (at.start, self.chars[self.at - 1].end))

    def substitution(self, inside: int, quoted: bool) -> Substitution:
        start, at = self.at, self.chars[self.at]
        waiting, self.waiting = self.waiting, []
        self.at = inside
        body = self.sequence((")",))
        self.take(")")
        self.waiting = waiting
        text = self.text[start : self.at]
        return Substitution(body, text, quoted, at, (at.start, self.chars[self.at - 1].end))

    # Commands.

    def sequence(self, ends: Sequence[str]) -> Node:
        """Commands up to one of the words or operators ``ends``, which is left."""
        found = Node("sequence")
        while True:
            self.newlines()
            token = self.peek()
            if self.at >= len(self.text) or token in ends:
                return found
            if token in (";", "&"):
                self.take(token)
                continue
            if token in _ENDS or (token in _OPERATORS and token != "("):
                raise self.error(f"unexpected {token!r}")
            found.children.append(self.and_or())
            token = self.peek()
            if token in (";", "&", "\n"):
                self.take(token)
            elif self.at < len(self.text) and token not in ends:
                raise self.error(f"unexpected {token or self.text[self.at]!r}")

    def and_or(self) -> Node:
        found = Node("sequence", [self.pipeline()])
        while self.peek() in ("&&", "||"):
            self.take(self.peek())
            self.newlines()
            found.children.append(Node("maybe", [self.pipeline()]))
        return found.children[0] if len(found.children) == 1 else found

    def pipeline(self) -> Node:
        while self.peek() in ("!", "time"):
            self.take(self.peek())
        found = Node("pipeline", [self.command()])
        while self.peek() in ("|", "|&"):
            self.take(self.peek())
            self.newlines()
            found.children.append(self.command())
        return found.children[0] if len(found.children) == 1 else found

    def command(self) -> Node:
        token = self.peek()
        at = self.chars[self.at].start if self.at < len(self.chars) else 0
        compound = {
            "if": self.if_,
            "while": self.loop,
            "until": self.loop,
            "for": self.for_,
            "select": self.for_,
            "case": self.case,
            "{": self.group,
            "(": self.group,
            "function": self.function,
        }.get(token)
        if self.text.startswith("((", self.at):
            self.arithmetic_command()
            found = Node("command")
        elif compound:
            found = compound()
        elif token == "[[":
            found = self.test()
        else:
            found = self.simple()
        found.at = at
        if found.kind != "command":
            while self.redirection(found):
                pass
        return found

    def arithmetic_command(self) -> None:
        self.at -= 1  # as if a $ stood before it
        self.arithmetic(False)

    def test(self) -> Node:
        end = re.compile(r"\s\]\](?=$|[\s;&|)])").search(self.text, self.at)
        if not end:
            raise self.error("a [[ without its end")
        self.at = end.end()
        return Node("command")

    def if_(self) -> Node:
        found = Node("if")
        self.take("if")
        while True:
            start = self.at
            found.children.append(self.sequence(("then",)))
            condition = self.text[start : self.at].strip().rstrip(";").strip()
            # A test of variables alone holds as long as they stay what they are.
            if re.fullmatch(r"\[.*\]", condition) and not _CHANGES.search(condition):
                found.children[-1].name = condition
            self.take("then")
            found.children.append(self.sequence(("elif", "else", "fi")))
            token = self.peek()
            self.take(token or "fi")
            if token == "else":
                found.children.append(self.sequence(("fi",)))
                self.take("fi")
            if token != "elif":
                return found

    def body(self) -> Node:
        self.newlines()
        if self.peek() == "{":
            return self.group()
        self.take("do")
        found = self.sequence(("done",))
        self.take("done")
        return found

    def loop(self) -> Node:
        self.take(self.peek())
        condition = self.sequence(("do",))
        return Node("loop", [condition, self.body()])

    def for_(self) -> Node:
        self.take(self.peek())
        self.blank()
        found = Node("for")
        if self.text.startswith("((", self.at):
            self.arithmetic_command()
        else:
            name = _NAME.match(self.text, self.at)
            if not name:
                raise self.error("a for without a variable")
            found.name, self.at = name[0], name.end()
            self.newlines()
            if self.peek() == "in":
                self.take("in")
                while word := self.word():
                    found.words.append(word)
            else:
                found.words.append([_params(self.chars[self.at - 1])])
        if self.peek() == ";":
            self.take(";")
        found.children.append(self.body())
        return found

    def case(self) -> Node:
        self.take("case")
        found = Node("case", words=[self.word()])
        self.newlines()
        self.take("in")
        self.newlines()
        while self.peek() != "esac":
            if self.peek() == "(":
                self.take("(")
            start = self.at
            while self.word() and self.peek() == "|":
                self.take("|")
            pattern = self.text[start : self.at].strip()
            self.take(")")
            found.children.append(self.sequence((";;", ";&", ";;&", "esac")))
            found.children[-1].name = pattern
            if self.peek() != "esac":
                self.take(self.peek() or ";;")
            self.newlines()
        self.take("esac")
        return found

    def group(self) -> Node:
        opening = self.peek()
        closing = "}" if opening == "{" else ")"
        self.take(opening)
        found = Node("group" if opening == "{" else "subshell", [self.sequence((closing,))])
        self.take(closing)
        return found

    def function(self) -> Node:
        self.take("function")
        name = self.peek()
        self.take(name or "a name")
        if self.peek() == "(":
            self.take("(")
            self.take(")")
        self.newlines()
        return Node("function", [self.command()], name=name)

    def simple(self) -> Node:
        found = Node("command")
        declares = False
        while True:
            self.blank()
            if self.redirection(found):
                continue
            start = self.at
            given = _ASSIGNMENT.match(self.text, self.at)
            if given and (declares or not found.words):
                found.assignments.append(self.assignment(given[0]))
                continue
            word = self.word()
            if not word:
                break
            found.words.append(word)
            plain = self.text[start : self.at]
            if len(found.words) == 1:
                declares = plain in _DECLARE
                if self.text.startswith("(", self.at) or self.peek() == "(":
                    self.take("(")
                    self.take(")")
                    self.newlines()
                    return Node("function", [self.command()], name=plain)
        if not found.words and not found.assignments and not found.here and not found.redirected:
            raise self.error(f"unexpected {self.peek() or self.text[self.at : self.at + 1]!r}")
        return found

    def assignment(self, given: str) -> Assignment:
        self.at += len(given)
        name = _NAME.match(given)[0]
        append = given.endswith("+=") or "[" in given
        if not self.text.startswith("(", self.at):
            return Assignment(name, append, self.parts(lambda c: c in _META), "[" in given)
        self.at += 1
        words = []
        while True:
            self.newlines()
            if self.text.startswith(")", self.at):
                self.at += 1
                return Assignment(name, append, words, True)
            word = self.word()
            if not word:
                raise self.error(f"unexpected {self.text[self.at : self.at + 1] or 'end'!r}")
            words.append(word)

    def redirection(self, node: Node) -> bool:
        self.blank()
        found = _REDIRECTION.match(self.text, self.at)
        if not found:
            return False
        self.at = found.end()
        self.blank()
        start = self.at
        word = self.word()
        if not word:
            raise self.error(f"{found[0]!r} without what follows it")
        if found[2] in ("<<", "<<-"):
            raw = any(isinstance(part, Literal) and part.quoted for part in word)
            end = "".join(value(part.chars) for part in word if isinstance(part, Literal))
            where: list = []
            node.here.append(where)
            self.waiting.append((end, found[2] == "<<-", raw, where))
        elif found[2] == "<<<":
            node.here.append([self.chars[start : self.at], None])
        elif ">" in found[2] and found[2] != ">&" and found[1] != "2":
            node.redirected = True
        return True


def _params(at: Char) -> Variable:
    return Variable("@", "@", "", None, True, at, (at.start, at.end))
