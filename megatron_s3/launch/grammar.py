"""The part of the shell's grammar that launch scripts use.

Nothing is executed. Other syntax is an error.
"""

import re
from collections.abc import Sequence

from megatron_s3.launch.shell import (
    Assignment,
    Char,
    HereDocument,
    Literal,
    Node,
    Variable,
    Word,
    value,
)
from megatron_s3.launch.words import META, Words

__all__ = ["DECLARE", "here_document", "parse"]

_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[([^]]*)\])?(\+)?=")
_REDIRECTION = re.compile(r"(\d+|\{\w+\})?(<<<|<<-|<<|<>|<&|>&|>>|>\||<(?!\()|>(?!\()|&>>|&>)")
_TIME_OPTION = re.compile(r"[ \t]+-p(?=\s)")
_TEST = re.compile(
    r"""\[\[(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^'"\\])*?\s\]\](?=$|[\s;&|)])""", re.DOTALL
)
# Parts of a condition that may change without a change of a named variable.
_CHANGES = re.compile(r"[`\n;]|\$\(|\$\{?[?@*#0-9]|\]\s*(&&|\|\|)|\s-(?![nzv]\s)[a-zA-Z]\s")
#: Commands that assign to variables.
DECLARE = {"export", "declare", "local", "readonly", "typeset"}
_ENDS = {"then", "do", "done", "fi", "else", "elif", "esac", "}"}


def parse(chars: Sequence[Char]) -> Node:
    """Reads the commands of a script.

    Raises:
        LaunchError: the text is not a shell script.
    """
    return _Parser(chars).script()


def here_document(chars: Sequence[Char]) -> Word:
    """Reads the text of a ``<<`` in which expansions are made."""
    return _Parser(chars).parts("", quoted=True)


class _Parser(Words):
    def sequence(self, ends: Sequence[str]) -> Node:
        """Reads the commands up to one of the words or operators ``ends``, and leaves that."""
        found = Node("sequence")
        while True:
            self.newlines()
            token = self.peek()
            if self.at >= len(self.text) or token in ends:
                return found
            if token in (";", "&"):
                self.take(token)
                continue
            if token in _ENDS:
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
            self.skip(_TIME_OPTION)
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
            self.arithmetic()
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

    def test(self) -> Node:
        if not self.skip(_TEST):
            raise self.error("[[ is not closed")
        return Node("command")

    def if_(self) -> Node:
        found = Node("if")
        self.take("if")
        while True:
            start = self.at
            found.children.append(self.sequence(("then",)))
            condition = self.text[start : self.at].strip().rstrip(";").strip()
            # A test of variables alone keeps its result until one of them changes.
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
        arithmetic = self.text.startswith("((", self.at)
        if arithmetic:
            self.arithmetic()
        else:
            name = self.skip(_NAME)
            if not name:
                raise self.error("for without a variable")
            found.name = name[0]
            self.newlines()
            if self.peek() == "in":
                self.take("in")
                while word := self.word():
                    found.words.append(word)
            else:
                found.words.append([Variable("@", "@", "", [], True, self.unknown(self.at - 1))])
        if self.peek() == ";":
            self.take(";")
        found.children.append(self.body())
        return Node("loop", [Node("sequence"), *found.children]) if arithmetic else found

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
        found = self.sequence((closing,))
        self.take(closing)
        return found if opening == "{" else Node("subshell", [found])

    def function(self) -> Node:
        self.take("function")
        name = self.peek()
        self.take(name or "a name")
        return self.function_named(name)

    def function_named(self, name: str) -> Node:
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
            if (declares or not found.words) and (given := self.skip(_ASSIGNMENT)):
                found.assignments.append(self.assignment(*given.groups("")))
                continue
            word = self.word()
            if not word:
                break
            found.words.append(word)
            plain = self.text[start : self.at]
            if len(found.words) == 1:
                declares = plain in DECLARE
                if self.peek() == "(":
                    return self.function_named(plain)
        if not found.words and not found.assignments and not found.here and not found.redirected:
            raise self.error(f"unexpected {self.peek() or self.text[self.at : self.at + 1]!r}")
        return found

    def assignment(self, name: str, index: str, plus: str) -> Assignment:
        if not self.text.startswith("(", self.at):
            return Assignment(name, index, bool(plus), self.parts(META))
        self.at += 1
        items: list[Word] = []
        while True:
            self.newlines()
            if self.text.startswith(")", self.at):
                self.at += 1
                return Assignment(name, index, bool(plus), [], items)
            word = self.word()
            if not word:
                raise self.error(f"unexpected {self.text[self.at : self.at + 1] or 'end'!r}")
            items.append(word)

    def redirection(self, node: Node) -> bool:
        self.blank()
        found = self.skip(_REDIRECTION)
        if not found:
            return False
        self.blank()
        start = self.at
        word = self.word()
        if not word:
            raise self.error(f"nothing follows {found[0]!r}")
        if found[2] in ("<<", "<<-"):
            raw = any(isinstance(part, Literal) and part.quoted for part in word)
            end = "".join(value(part.chars) for part in word if isinstance(part, Literal))
            document = HereDocument(raw=raw)
            node.here.append(document)
            self.waiting.append((end, found[2] == "<<-", document))
        elif found[2] == "<<<":
            node.here.append(HereDocument(self.chars[start : self.at]))
        elif ">" in found[2] and found[2] != ">&" and found[1] != "2":
            node.redirected = True
        return True
