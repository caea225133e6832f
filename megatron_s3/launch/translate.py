"""``megatron-s3 args``: an AdamW launch as the S3 launch that the paper's rules make of it.

What is read is a shell line, a script or the arguments alone.  Only what changes is replaced;
quotes, comments, continued lines and everything else stay as they are.
"""

import argparse
import itertools
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

__all__ = ["LaunchError", "Translation", "main", "translate"]

LR_FACTOR = "10"

_TIMES = ("--lr", "--min-lr", "--decoupled-lr", "--decoupled-min-lr", "--lr-warmup-init")
_OVER = ("--weight-decay", "--start-weight-decay", "--end-weight-decay")
_DEFAULT_WEIGHT_DECAY = "0.01"  # Megatron's
_ADAMS = ("--adam-beta1", "--adam-beta2", "--adam-eps")
_ADAM = ("adam", "adamw")
_STATES = ("--exp-avg-dtype", "--exp-avg-sq-dtype")
_WORD = re.compile(r"""(?:\\\n|\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^\s'"\\;&|()<>]|\\$)+""", re.DOTALL)
_FLAGS_INSIDE = re.compile(r"(?:^|\s)--[a-z][\w-]+(?:\s|=|$)")
_COMMENT = re.compile(r"#[^\n]*")


class LaunchError(ValueError):
    """The launch cannot be translated; the message says why, and what to do."""


@dataclass(frozen=True)
class Word:
    """A word of the shell's: its place in the text, and its value without quotes."""

    start: int
    end: int
    value: str


@dataclass(frozen=True)
class Translation:
    """An S3 launch.

    Attributes:
        text: the launch.
        changes: what became what, and why.
        warnings: what has to be seen to by hand.
    """

    text: str
    changes: tuple[str, ...]
    warnings: tuple[str, ...]


def translate(text: str, lr_factor: str = LR_FACTOR) -> Translation:
    """The launch for S3.

    Args:
        text: a shell line, a script, or arguments alone.
        lr_factor: S3's learning rate over AdamW's, a decimal number.

    Raises:
        LaunchError: it is no launch of AdamW's.
    """
    words = list(_words(text))
    edits = _Edits(text, words)
    factor = Decimal(lr_factor)
    _optimizer(edits)
    for flag in _TIMES:
        edits.scale(flag, factor, f"x {lr_factor}: the paper's rate for S3 over AdamW's")
    why = "so that lr * weight_decay stays as it was"
    decays = [edits.scale(flag, 1 / factor, f"/ {lr_factor}, {why}", factor) for flag in _OVER]
    if not decays[0] and not all(decays[1:]):
        new = _number(_DEFAULT_WEIGHT_DECAY, 1 / factor, factor)
        edits.add(
            f"--weight-decay {new}", f"Megatron's default {_DEFAULT_WEIGHT_DECAY} / {factor}, {why}"
        )
    for flag in _ADAMS:
        edits.drop(flag, "AdamW's; S3 has --s3-beta 0.95 and --s3-p 3 by default, and no eps")
    edits.value(
        "--clip-grad", "0", "S3 is not clipped: no element of its update exceeds lr, by Theorem 2"
    )
    _script(edits)
    _warn(edits)
    return Translation(edits.result(), tuple(edits.changes), tuple(edits.warnings))


def _words(text: str, start: int = 0, end: int | None = None) -> Iterator[Word]:
    """The words of a text; of a quoted string that holds flags, the words inside."""
    end = len(text) if end is None else end
    at = start
    while at < end:
        if text[at] == "#" and (at == start or text[at - 1].isspace()):
            at = _COMMENT.match(text, at, end).end()
            continue
        if text.startswith("\\\n", at):
            at += 2
            continue
        found = _WORD.match(text, at, end)
        if not found:
            at += 1
            continue
        at = found.end()
        quoted = re.search(r"""(["'])(.*)\1$""", found[0], re.DOTALL)
        if quoted and _FLAGS_INSIDE.search(quoted[2]):
            inside = found.start() + quoted.start(2)
            yield from _words(text, inside, inside + len(quoted[2]))
            continue
        try:
            value = "".join(shlex.split(found[0], posix=True))
        except ValueError:
            value = found[0]
        yield Word(found.start(), found.end(), value)


class _Edits:
    """Changes to a text, each with its reason."""

    def __init__(self, text: str, words: list[Word]) -> None:
        self.text, self.words = text, words
        self.changes: list[str] = []
        self.warnings: list[str] = []
        self._replaced: list[tuple[int, int, str]] = []
        self._added: list[str] = []

    def found(self, flag: str) -> list[tuple[Word, Word | None, str]]:
        """Every ``--flag VALUE`` and ``--flag=VALUE``: first word, second if any, value."""
        found = []
        for number, word in enumerate(self.words):
            if word.value.startswith(flag + "="):
                found.append((word, None, word.value[len(flag) + 1 :]))
            elif word.value == flag:
                following = self.words[number + 1 : number + 2]
                found.append((word, *following, following[0].value if following else ""))
        return [each if len(each) == 3 else (each[0], None, each[1]) for each in found]

    def has(self, flag: str) -> bool:
        return any(w.value == flag or w.value.startswith(flag + "=") for w in self.words)

    def value(self, flag: str, new: str, reason: str) -> bool:
        """Replaces the flag's value wherever it is given; whether it is."""
        found = self.found(flag)
        for word, second, old in found:
            if old == new:
                continue
            place = second or Word(word.start + len(flag) + 1, word.end, old)
            self._replaced.append((place.start, place.end, new))
            self.changes.append(f"{flag} {old} -> {new}: {reason}")
        return bool(found)

    def scale(self, flag: str, factor: Decimal, reason: str, over: Decimal | None = None) -> bool:
        found = self.found(flag)
        for word, second, old in found:
            try:
                new = _number(old, factor, over)
            except InvalidOperation:
                self.warnings.append(
                    f"{flag} {old} is no number here: change it where it is set, {reason}"
                )
                continue
            if Decimal(old) == 0:
                continue
            place = second or Word(word.start + len(flag) + 1, word.end, old)
            self._replaced.append((place.start, place.end, new))
            self.changes.append(f"{flag} {old} -> {new}: {reason}")
        return bool(found)

    def drop(self, flag: str, reason: str) -> None:
        for word, second, value in self.found(flag):
            start, end = word.start, (second or word).end
            line = self.text.rfind("\n", 0, start) + 1
            after = re.compile(r"[ \t]*\\?\n").match(self.text, end)
            if not self.text[line:start].strip() and after:
                start, end = line, after.end()  # the whole line
            else:
                while start > 0 and self.text[start - 1] in " \t":
                    start -= 1
            self._replaced.append((start, end, ""))
            self.changes.append(f"{flag} {value} left out: {reason}")

    def insert(self, at: int, new: str, change: str) -> None:
        self._replaced.append((at, at, new))
        self.changes.append(change)

    def add(self, new: str, reason: str) -> None:
        """Adds a flag beside ``--lr``, or at the end."""
        self._added.append(new)
        self.changes.append(f"{new} added: {reason}")

    def result(self) -> str:
        if self._added:
            place = [second or word for word, second, _ in self.found("--lr")]
            at = place[-1].end if place else len(self.text.rstrip())
            self._replaced.append((at, at, "".join(f" {new}" for new in self._added)))
        text = self.text
        # From the end, so that the places before stay right; of two at one place, the replacement
        # of what ends there comes after what is put in.
        for start, end, new in sorted(self._replaced, reverse=True):
            text = text[:start] + new + text[end:]
        return text


def _number(old: str, factor: Decimal, over: Decimal | None = None) -> str:
    """``old`` times the factor (or, exactly, over ``over``), written as it was."""
    value = Decimal(old)
    if not value.is_finite():
        raise InvalidOperation(old)
    # Through the number that Megatron reads, for what the division does not end with.
    new = value / over if over else value * factor
    new = new.normalize()
    if len(new.as_tuple().digits) > 17:
        return repr(float(new))
    if "e" not in old.lower():
        return f"{new:f}"
    _, digits, exponent = new.as_tuple()
    mantissa = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if digits[1:] else "")
    sign = "-" if new < 0 else ""
    return f"{sign}{mantissa}e{exponent + len(digits) - 1}"


def _optimizer(edits: _Edits) -> None:
    found = edits.found("--optimizer")
    for _, _, name in found:
        if name == "s3":
            raise LaunchError("it is a launch of S3's already (--optimizer s3)")
        if name not in _ADAM:
            raise LaunchError(
                f"--optimizer {name}: the rules are for launches of AdamW's (--optimizer adam), "
                "which the paper compares with"
            )
    if found:
        edits.value("--optimizer", "s3", "S3 for every parameter, sharded as Adam is")
    elif edits.has("--lr") or any(edits.has(flag) for flag in (*_TIMES, *_ADAMS, *_OVER)):
        edits.add("--optimizer s3", "Megatron's default is adam")
    else:
        raise LaunchError(
            "no arguments of Megatron's in it (--optimizer, --lr, ...): give a launch of its "
            "trainer, or the arguments alone"
        )


def _script(edits: _Edits) -> None:
    words = edits.words
    if any(
        word.value == "-m" and following.value.startswith("megatron_s3")
        for word, following in itertools.pairwise(words)
    ):
        return
    scripts = [word for word in words if re.search(r"\.py$", word.value)]
    named = [word for word in scripts if "train" in Path(word.value).name]
    if not scripts:
        edits.warnings.append(
            "no script in it: put -m megatron_s3 before the one that you start (torchrun ... -m "
            "megatron_s3 pretrain_gpt.py ...), or apply the patch of patches/ to Megatron-LM"
        )
        return
    script = (named or scripts)[0]
    edits.insert(
        script.start,
        "-m megatron_s3 ",
        f"-m megatron_s3 before {script.value}: registers S3 in Megatron-LM, which stays unedited "
        "(the patch of patches/ does the same)",
    )


def _warn(edits: _Edits) -> None:
    from megatron_s3.mcore.arguments import UNSUPPORTED

    for _, flag, reason in UNSUPPORTED:
        if edits.has(flag):
            edits.warnings.append(f"{flag} is refused with S3: {reason}")
    for flag in _STATES:
        for _, _, dtype in edits.found(flag):
            if dtype not in ("fp32", "bf16"):
                edits.warnings.append(
                    f"{flag} {dtype} is refused with S3, which keeps its states in fp32 or bf16"
                )
    for _, _, dtype in edits.found("--main-params-dtype"):
        if dtype != "fp32":
            edits.warnings.append(f"--main-params-dtype {dtype} is refused with S3: leave it out")
    if edits.has("--use-precision-aware-optimizer") and not edits.has(
        "--use-distributed-optimizer"
    ):
        edits.warnings.append(
            "--use-precision-aware-optimizer is refused without --use-distributed-optimizer"
        )
    for _, _, folder in edits.found("--load"):
        if not edits.has("--no-load-optim") and not edits.has("--finetune"):
            edits.warnings.append(
                f"--load {folder}: AdamW's state in it is refused. `megatron-s3 convert {folder} "
                "NEW --to s3` makes a checkpoint that S3 resumes from (--load NEW), and "
                "--no-load-optim takes the weights alone"
            )
    for flag in ("--use-checkpoint-opt_param-scheduler", "--use-checkpoint-args"):
        if edits.has(flag):
            edits.warnings.append(
                f"{flag}: what the checkpoint was saved with is taken, and not what stands here"
            )
    if not edits.has("--lr"):
        edits.warnings.append(f"no --lr in it: S3's is {LR_FACTOR} times AdamW's")
    for flag in ("--config", "--yaml-cfg"):
        if edits.has(flag) and flag != "--yaml-cfg":
            edits.warnings.append(f"{flag}: what that file holds was not read")


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        0; 2 after one line on stderr if the launch cannot be translated.
    """
    argv = list(argv)
    after = argv[argv.index("--") + 1 :] if "--" in argv else None
    parser = argparse.ArgumentParser(
        prog="megatron-s3 args",
        allow_abbrev=False,
        usage="megatron-s3 args [--lr-factor X] (FILE | - | -- COMMAND ...)",
        description="Print an AdamW launch as the S3 launch that the paper's rules make of it, "
        "and on stderr a reason for each change. What else is there stays as it is.",
    )
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help="a script, or a file of arguments; - reads stdin"
    )
    parser.add_argument(
        "--lr-factor",
        type=Decimal,
        default=Decimal(LR_FACTOR),
        metavar="X",
        help="S3's learning rate over AdamW's (%(default)s, the paper's)",
    )
    args = parser.parse_args(argv[: argv.index("--")] if after is not None else argv)
    if (args.file is None) == (after is None):
        parser.error("give either a file (- for stdin), or a command after --")
    if not (args.lr_factor.is_finite() and args.lr_factor > 0):
        parser.error(f"--lr-factor must be a positive number, not {args.lr_factor}")
    try:
        if after is not None:
            text = shlex.join(after) + "\n"
        else:
            text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text()
        found = translate(text, str(args.lr_factor))
    except (LaunchError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(found.text, end="" if found.text.endswith("\n") else "\n", flush=True)
    for change in found.changes:
        print(f"[args] {change}", file=sys.stderr)
    for warning in found.warnings:
        print(f"[args] warning: {warning}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
