"""``megatron-s3 args``: an AdamW launch as the S3 launch that the paper's rules make of it.

What is read is a shell line, a script or the arguments alone.  Each launch of the trainer is
followed to where its arguments stand: in variables, arrays, functions, quoted commands and
here-documents.  Only what changes is replaced; quotes, comments, continued lines and everything
else stay as they are.  The result is followed in the same way and compared with what the launches
have to become before any of it is given out; what cannot be followed is refused.
"""

import argparse
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from megatron_s3.launch.edits import Edits, WrongEdit, compare, line
from megatron_s3.launch.launches import FLAGS, Launch, LaunchError, find, shown, unused
from megatron_s3.launch.rules import OVER, TIMES, Rules, number
from megatron_s3.launch.shell import UNKNOWN, ShellError, value
from megatron_s3.launch.trace import Trace, trace

__all__ = ["LaunchError", "Translation", "main", "translate"]

#: S3's learning rate over AdamW's in the paper, each from its beginning. A checkpoint in mid-run
#: is converted with another (megatron_s3.checkpoints.transfer).
LR_FACTOR = "10"

_ADAM = ("adam", "adamw")
_STATES = ("--exp-avg-dtype", "--exp-avg-sq-dtype")
_WATCHED = re.compile(
    rf"(?<![\w-])(?:{'|'.join(FLAGS)})(?![\w-])(?:[ =]\S+)?|\S+\.py\b|\btorchrun\b|\bpython[\d.]*\b"
    r"|(?<![\w-])-m\s+\S+"
)
_REFUSED = re.compile(r"^--\S+( \S+)? is refused with")
_AFTER_FLAG = re.compile(rf"(?:{'|'.join((*FLAGS, '-m'))})[ =][\"']?\$\{{?(\w+)")


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

    @property
    def refused(self) -> tuple[str, ...]:
        """Returns those of the warnings that are of flags with which S3 does not start."""
        return tuple(each for each in self.warnings if _REFUSED.search(each))


def translate(text: str, lr_factor: str = LR_FACTOR) -> Translation:
    """Translates a launch into one for S3.

    Args:
        text: a shell line, a script, or arguments alone.
        lr_factor: S3's learning rate over AdamW's, a decimal number.

    Raises:
        LaunchError: it is no launch of AdamW's, or one that cannot be followed.
    """
    from megatron_s3.optimizers import S3  # and torch with it, which --help does without

    rules = Rules(lr_factor, S3.description.name)
    try:
        before = _follow(text)
        launches = _launches(text, before, rules.optimizer)
    except LaunchError as error:
        raise LaunchError(f"{line(text, error.place)}{error}") from error
    reason = ""
    tried: set[str] = set()
    for way in itertools.product((True, False), repeat=3):
        edits = Edits(text, rules, *way)
        try:
            for launch in launches:
                edits.launch(launch)
            result = edits.result()
            if result in tried:
                continue
            tried.add(result)
            notes = compare(before, _follow(result), rules)
        except WrongEdit as error:
            reason = reason or str(error)
            continue
        warnings = _warnings(text, launches, lr_factor)
        return Translation(result, (*edits.changes, *notes), tuple(warnings))
    raise LaunchError(
        f"the changes cannot be made here without changing something else ({reason}): "
        "write the launch out with its own flags"
    )


def _follow(text: str) -> Trace:
    names = frozenset(_AFTER_FLAG.findall(text))
    try:
        return trace(text, lambda part: tuple(_WATCHED.findall(part)), names)
    except ShellError as error:
        raise LaunchError(f"{line(text, error.place)}{error}") from error


def _launches(text: str, found: Trace, optimizer: str) -> list[Launch]:
    """Returns AdamW's launches in the text, each once for each way on which it differs."""
    launches = find(found)
    left = unused(text, found, launches)
    if left is not None:
        raise LaunchError(
            "the command that takes this --lr cannot be found from here: start it in the same "
            "script, write the launch out, or remove the flag",
            left,
        )
    if not any(launch.flags() for launch in launches):
        raise LaunchError(
            "it has no arguments of Megatron (--optimizer, --lr, ...): give a launch of the "
            "trainer, or the arguments alone"
        )
    for launch in launches:
        _check(launch, optimizer)
    return launches


def _check(launch: Launch, optimizer: str) -> None:
    for flag in launch.flags():
        old = value(flag.value)
        if flag.name == "--optimizer":
            if UNKNOWN in old:
                raise LaunchError(
                    f"--optimizer {shown(flag.value)} is known only when the script runs: write "
                    "its name out",
                    launch.place,
                )
            if old == optimizer:
                raise LaunchError(
                    f"it is a launch with S3 already (--optimizer {old})", launch.place
                )
            if old not in _ADAM:
                raise LaunchError(
                    f"--optimizer {old}: only launches with AdamW (--optimizer adam) can be "
                    "rewritten",
                    launch.place,
                )
        elif flag.name in (*TIMES, *OVER):
            try:
                number(old, Decimal(1))
            except InvalidOperation:
                raise LaunchError(
                    f"{flag.name} {shown(flag.value)} is no number here: write the number out, or "
                    "set it in the script",
                    launch.place,
                ) from None


def _warnings(text: str, launches: Sequence[Launch], lr_factor: str) -> list[str]:
    """Returns what has to be seen to by hand, each once."""
    found: list[str] = []
    for launch in launches:
        found += _of_program(launch)
        found += _refused(launch)
        found += _of_checkpoints(launch, lr_factor)
        found += _of_flags_elsewhere(text, launch)
    return list(dict.fromkeys(found))


def _of_program(launch: Launch) -> Iterator[str]:
    if launch.trainer < 0:
        yield (
            "no script in it: put -m megatron_s3 before the one that you start (torchrun ... "
            "-m megatron_s3 pretrain_gpt.py ...), or apply the patch of patches/ to Megatron-LM"
        )
    elif UNKNOWN in value(launch.words[launch.trainer - 1]):
        yield (
            f"{shown(launch.words[launch.trainer - 1])} is set elsewhere: it has to end with "
            "python, torchrun, or options of theirs"
        )


def _refused(launch: Launch) -> Iterator[str]:
    from megatron_s3.mcore.arguments import UNSUPPORTED

    for _, flag, reason in UNSUPPORTED:
        if _has(launch, flag):
            yield f"{flag} is refused with S3: {reason}"
    for flag in _STATES:
        for dtype in _values(launch, flag):
            if dtype not in ("fp32", "bf16"):
                yield f"{flag} {dtype} is refused with S3, which keeps its states in fp32 or bf16"
    for dtype in _values(launch, "--main-params-dtype"):
        if dtype != "fp32":
            yield f"--main-params-dtype {dtype} is refused with S3: leave it out"
    aware, sharded = "--use-precision-aware-optimizer", "--use-distributed-optimizer"
    if _has(launch, aware) and not _has(launch, sharded):
        yield f"{aware} is refused with S3 without {sharded}"


def _of_checkpoints(launch: Launch, lr_factor: str) -> Iterator[str]:
    for folder in _values(launch, "--load"):
        if not _has(launch, "--no-load-optim") and not _has(launch, "--finetune"):
            yield (
                f"--load {folder}: AdamW's state in it is refused. `megatron-s3 convert "
                f"{folder} NEW --to s3 --lr-factor {lr_factor}` makes a checkpoint that "
                "S3 resumes from with these rates (--load NEW); in mid-run --lr-factor 3, here "
                "and there, goes better. --no-load-optim takes the weights alone"
            )
    for flag in ("--use-checkpoint-opt_param-scheduler", "--use-checkpoint-args"):
        if _has(launch, flag):
            yield f"{flag}: what the checkpoint was saved with is taken, and not what stands here"


def _of_flags_elsewhere(text: str, launch: Launch) -> Iterator[str]:
    if launch.bare:
        yield (
            f"{line(text, launch.place)}flags of AdamW's that come from elsewhere (a variable "
            "of the environment, a file that is read) stay as they are"
        )
    elif not _has(launch, "--lr"):
        yield f"no --lr in it: S3's is {LR_FACTOR} times AdamW's"
    if _has(launch, "--config"):
        yield "--config: what that file holds was not read"
    for word in launch.words[launch.arguments :]:
        name = shown(word)
        if value(word) == UNKNOWN and re.search(r"^\$.*(@|ARG|OPT|FLAG|EXTRA)", name.upper()):
            yield f"{name} is not known here: flags of AdamW's that it may hold stay as they are"


def _has(launch: Launch, flag: str) -> bool:
    return any(text.partition("=")[0] == flag for text in launch.texts)


def _values(launch: Launch, flag: str) -> Iterator[str]:
    words = launch.words[launch.arguments :]
    for word, following in zip(words, (*words[1:], ()), strict=True):
        if value(word) == flag:
            yield shown(following)
        elif value(word).startswith(flag + "="):
            yield shown(word[len(flag) + 1 :])


def _factor(text: str) -> Decimal:
    try:
        factor = Decimal(text)
    except InvalidOperation:
        factor = Decimal("nan")
    if not (factor.is_finite() and factor > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return factor


def _check_syntax(text: str) -> None:
    """Lets bash read the text, where there is one, and run none of it."""
    bash = shutil.which("bash")
    if not bash:
        return
    done = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"status {done.returncode}"]
        raise LaunchError(f"it is no shell script that bash can read ({lines[0]})")


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        0; 2 after one line on stderr if the launch cannot be translated, or has what S3 refuses.
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
        type=_factor,
        default=Decimal(LR_FACTOR),
        metavar="X",
        help="S3's learning rate over AdamW's (%(default)s, the paper's, for a run from its "
        "beginning; for one that goes on from a converted checkpoint what convert was given, 3 by "
        "default)",
    )
    args = parser.parse_args(argv[: argv.index("--")] if after is not None else argv)
    if (args.file is None) == (after is None):
        parser.error("give either a file (- for stdin), or a command after --")
    try:
        if after is not None:
            text = shlex.join(after) + "\n"
        else:
            text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text()
        _check_syntax(text)
        found = translate(text, str(args.lr_factor))
        _check_syntax(found.text)
        if found.refused:
            raise LaunchError("; ".join(found.refused))
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
