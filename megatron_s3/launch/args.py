"""``megatron-s3 args``: converts an AdamW launch to an S3 launch by the paper's rules.

The input is a shell line, a script or arguments alone. The code follows each launch of the trainer
to the places of its arguments: variables, arrays, functions, quoted commands and here-documents. It
replaces only what changes; quotes, comments, continued lines and everything else stay the same.
Before it prints the result, it follows the result in the same way and compares it with the expected
launches. Scripts that it cannot follow are rejected with an error.
"""

import argparse
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from megatron_s3.errors import no_file
from megatron_s3.launch.edits import Edits, WrongEdit, compare, line
from megatron_s3.launch.launches import Launch, find, shown, unused
from megatron_s3.launch.shell import UNKNOWN, LaunchError, value
from megatron_s3.launch.trace import Trace, trace
from megatron_s3.paper import FLAGS, LR_FACTOR, OVER, TIMES, Rules, number

__all__ = ["LaunchError", "Translation", "main", "translate"]

_ADAM = ("adam", "adamw")


@dataclass(frozen=True)
class Translation:
    """An S3 launch.

    Attributes:
        text: the converted launch.
        changes: each change with its reason.
        warnings: what the user must check or change by hand.
        refused: the warnings about flags with which S3 does not start.
    """

    text: str
    changes: tuple[str, ...]
    warnings: tuple[str, ...]
    refused: tuple[str, ...]


def translate(text: str, lr_factor: str = LR_FACTOR) -> Translation:
    """Converts a launch to one for S3.

    Args:
        text: a shell line, a script, or arguments alone.
        lr_factor: S3's learning rate divided by AdamW's, a decimal number.

    Raises:
        LaunchError: the text is not an AdamW launch, or its launch cannot be followed.
    """
    from megatron_s3.optimizers import S3  # imports torch, which --help does not need

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
        except (WrongEdit, LaunchError) as error:
            reason = reason or str(error)
            continue
        warnings = _once(_warnings(text, launches, lr_factor))
        refused = _once(each for launch in launches for each in _refused(launch))
        return Translation(result, (*edits.changes, *notes), warnings, refused)
    raise LaunchError(
        f"the launch cannot be changed without changing something else ({reason}); give each "
        "launch flags of its own"
    )


def _follow(text: str) -> Trace:
    return trace(text, tuple(FLAGS))


def _launches(text: str, found: Trace, optimizer: str) -> list[Launch]:
    """Returns the AdamW launches in the text, once for each set of arguments that they may have."""
    launches = find(found)
    left = unused(text, found, launches)
    if left is not None:
        raise LaunchError(
            f"no command in this text takes this {text[left:].split('=')[0].split()[0]}; add the "
            "command that starts the trainer, write the flag out in it, or remove the flag",
            left,
        )
    if not any(launch.flags() for launch in launches):
        raise LaunchError(
            "the text has no arguments of Megatron (--optimizer, --lr, ...); give a launch of "
            "the trainer, or its arguments alone"
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
                    f"--optimizer {shown(flag.value)}: the value is known only when the script "
                    "runs; write the name of the optimizer instead",
                    launch.place,
                )
            if old == optimizer:
                raise LaunchError(f"the launch uses S3 already (--optimizer {old})", launch.place)
            if old not in _ADAM:
                raise LaunchError(
                    f"--optimizer {old}: only launches with AdamW (--optimizer adam) can be "
                    "converted",
                    launch.place,
                )
        elif flag.name in (*TIMES, *OVER):
            try:
                number(old, Decimal(1))
            except InvalidOperation:
                raise LaunchError(
                    f"{flag.name} {shown(flag.value)} is not a number in this text; write a "
                    "number, or set the variable in the script",
                    launch.place,
                ) from None


def _once(found: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(found))


def _warnings(text: str, launches: Sequence[Launch], lr_factor: str) -> Iterator[str]:
    for launch in launches:
        yield from _of_program(launch)
        yield from _refused(launch)
        yield from _of_checkpoints(launch, lr_factor)
        yield from _of_flags_elsewhere(text, launch, lr_factor)


def _of_program(launch: Launch) -> Iterator[str]:
    if launch.trainer < 0:
        yield (
            "the text starts no script: put -m megatron_s3 before the script that you start "
            "(torchrun ... -m megatron_s3 pretrain_gpt.py ...), or apply the patch in patches/ "
            "to Megatron-LM"
        )
    elif launch.trainer > 0 and value(launch.words[launch.trainer - 1]) == UNKNOWN:
        before = value(launch.words[launch.trainer - 2]) if launch.trainer > 1 else ""
        if not before.startswith("-") or "=" in before:  # else it is the value of an option
            yield (
                f"{shown(launch.words[launch.trainer - 1])} is not set in this text: it must end "
                "with python, torchrun or options of them, because -m megatron_s3 follows it"
            )
    front = [value(word) for word in launch.words[: max(launch.trainer, 0)]]
    by_ray = any(text.rpartition("/")[2] == "ray" for text in front)
    if by_ray and not any("MEGATRON_S3" in text for text in front):
        yield (
            "-m megatron_s3 registers S3 in the program that ray starts, and not in the program's "
            "actors: run `megatron-s3 hook install` in their Python environment, and put "
            "MEGATRON_S3=1 into the env_vars of Ray's runtime environment"
        )


def _refused(launch: Launch) -> Iterator[str]:
    from megatron_s3.mcore.arguments.validation import UNSUPPORTED

    for _, flag, reason in UNSUPPORTED:
        if _has(launch, flag):
            yield f"{flag} is not supported with S3: {reason}"
    yield from _refused_dtypes(launch)
    for dtype in _values(launch, "--main-params-dtype"):
        if dtype != "fp32":
            yield f"--main-params-dtype {dtype} is not supported with S3: leave the flag out"


def _refused_dtypes(launch: Launch) -> Iterator[str]:
    from megatron_s3.mcore.arguments.names import STATE_DTYPES, flag_named
    from megatron_s3.mcore.arguments.readers import hyperparameters, state_dtypes
    from megatron_s3.optimizers import S3

    holder = argparse.Namespace(use_precision_aware_optimizer=True)
    for name in STATE_DTYPES:
        given = [each for each in _values(launch, flag_named(name)) if "$" not in each]
        setattr(holder, name, given[-1] if given else "fp32")
    for name, (state, dtype) in zip(STATE_DTYPES, state_dtypes(S3, holder).items(), strict=False):
        try:
            S3.check_state_dtype(state, dtype, hyperparameters(S3, holder))
        except ValueError as error:
            yield f"{flag_named(name)} {getattr(holder, name)}: {error}"


def _of_checkpoints(launch: Launch, lr_factor: str) -> Iterator[str]:
    for folder in _values(launch, "--load"):
        if not _has(launch, "--no-load-optim") and not _has(launch, "--finetune"):
            yield (
                f"--load {folder}: S3 cannot load AdamW's optimizer state. Convert the checkpoint "
                f"with `megatron-s3 convert {folder} NEW --to s3 --lr-factor {lr_factor}` and "
                "pass --load NEW (if AdamW has trained a large part of the run, use --lr-factor "
                "3 here and there), or load the weights alone with --no-load-optim"
            )
    for flag in ("--use-checkpoint-opt_param-scheduler", "--use-checkpoint-args"):
        if _has(launch, flag):
            yield (
                f"{flag}: the values saved in the checkpoint are used instead of those in this text"
            )


def _of_flags_elsewhere(text: str, launch: Launch, lr_factor: str) -> Iterator[str]:
    if launch.bare:
        yield (
            f"{line(text, launch.place)}flags of AdamW that come from outside this text (an "
            "environment variable, a sourced file) are not changed"
        )
    elif not _has(launch, "--lr"):
        yield f"the text has no --lr: S3's learning rate is {lr_factor} times AdamW's"
    if _has(launch, "--config"):
        yield "--config: the file is not read; change flags of AdamW in it by hand"
    for word in launch.words[launch.arguments :]:
        name = shown(word)
        if value(word) == UNKNOWN and re.search(r"^\$.*(@|ARG|OPT|FLAG|EXTRA)", name.upper()):
            yield (
                f"{name} is not set in this text; if it holds flags of AdamW, change them by hand"
            )


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
    """Checks the syntax with bash, if it is installed, without running the text."""
    bash = shutil.which("bash")
    if not bash:
        return
    done = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"status {done.returncode}"]
        raise LaunchError(f"bash cannot read the text as a shell script ({lines[0]})")


def _text(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{name}: cannot be read: {no_file(error)}") from error


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        0; 2 after one line on stderr if the launch cannot be converted or has flags that S3 does
        not support.
    """
    argv = list(argv)
    after = argv[argv.index("--") + 1 :] if "--" in argv else None
    parser = argparse.ArgumentParser(
        prog="megatron-s3 args",
        allow_abbrev=False,
        usage="megatron-s3 args [--lr-factor X] (FILE | - | -- COMMAND ...)",
        description=(
            "Convert an AdamW launch to the S3 launch that follows from the paper's rules, and "
            "print it. A reason for each change is printed on stderr. Everything else stays the "
            "same."
        ),
    )
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help="a script, or a file of arguments; - reads stdin"
    )
    parser.add_argument(
        "--lr-factor",
        type=_factor,
        default=Decimal(LR_FACTOR),
        metavar="X",
        help=(
            "S3's learning rate divided by AdamW's (default: %(default)s, the paper's for a run "
            "from its beginning; for a run that resumes from a converted checkpoint use the "
            "factor of convert, 3 by default)"
        ),
    )
    args = parser.parse_args(argv[: argv.index("--")] if after is not None else argv)
    if (args.file is None) == (after is None):
        parser.error("give either a file (- for stdin), or a command after --")
    try:
        text = _text(args.file) if after is None else shlex.join(after) + "\n"
        _check_syntax(text)
        found = translate(text, str(args.lr_factor))
        _check_syntax(found.text)
        if found.refused:
            raise LaunchError("; ".join(found.refused))
    except LaunchError as error:
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
