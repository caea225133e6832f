#!/usr/bin/env python3
"""Runs `megatron-s3 args` over the launch scripts of a Megatron-LM tree, and prints a table.

Every shell script with --lr is translated. Script and translation then run in a copy of the tree in
which stand-ins take the place of torchrun, python, srun and the like and write down how they are
called. What the translation starts must be what the script starts, changed by the paper's rules.
A file without a launch is read by a shell that then starts the trainer with the variable in
which the file keeps its options.

With --convert-only nothing is run, for trees whose scripts stop processes or delete files. Then
bash checks the syntax of the translations, and no more.
"""

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
from decimal import Decimal
from pathlib import Path

from megatron_s3.launch.args import LaunchError, translate

RECORD = (
    '#!/bin/bash\nprintf \'%s\\x1f\' "${0##*/}" "$@" >> "$CALLS"; printf \'\\x1e\' >> "$CALLS"\n'
)
#: Runs what follows its own options.
PASS_ON = (
    "#!/bin/bash\nwhile (( $# )) && ! [[ $1 =~ ^(bash|sh|python[0-9.]*|torchrun|uv)$ ]]; do shift; "
    'done\nexec "$@"\n'
)
STAND_INS = {
    **dict.fromkeys(("torchrun", "python", "python3", "uv", "debugpy-run"), RECORD),
    **dict.fromkeys(("srun", "nsys"), PASS_ON),
    "sbatch": "#!/bin/bash\nexec bash\n",
    "pip": "#!/bin/bash\n",
}
#: What the scripts ask for.
ENVIRONMENT = {"WORKSPACE": "w", "LOAD_NAME": "l", "LOAD_ITER": "1", "MLM_MODEL_CKPT": "c"}
ARGUMENTS = {"examples/gptoss/02_train.sh": ["--checkpoint-path", "."]}
TIMES = ("--lr", "--min-lr", "--decoupled-lr", "--decoupled-min-lr", "--lr-warmup-init")
DECAYS = ("--weight-decay", "--start-weight-decay", "--end-weight-decay")
ADAMS = ("--adam-beta1", "--adam-beta2", "--adam-eps")


def main() -> int:
    """Prints the table; the status is 1 if a translation starts something else."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, help="a Megatron-LM checkout")
    parser.add_argument("--convert-only", action="store_true", help="run none of the scripts")
    args = parser.parse_args()
    tree = args.tree
    files = [
        path
        for path in sorted(tree.rglob("*"))
        if path.suffix in (".sh", ".slurm", ".sbatch")
        and path.is_file()
        and re.search(r"--lr\b", path.read_text(errors="replace"))
    ]
    if args.convert_only:
        texts = [(str(path.relative_to(tree)), path.read_text(errors="replace")) for path in files]
        return report([converted(name, text) for name, text in texts])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(tree, folder)
        return report(
            [judge(folder, str(path.relative_to(tree)), path.read_text()) for path in files]
        )


def report(results: list[tuple[str, str]]) -> int:
    """Prints the table; the status is 1 if a translation is wrong."""
    print("\n".join(f"{result:9} {what}" for result, what in results))
    counts = collections.Counter(result for result, _ in results)
    print(f"\n{len(results)} scripts with --lr: {dict(sorted(counts.items()))}")
    return int("WRONG" in counts)


def converted(name: str, text: str) -> tuple[str, str]:
    """Returns the result of a script that is not run, and what there is to say."""
    try:
        found = translate(text)
    except LaunchError as error:
        return "refused", f"{name}: {error}"
    if problem := syntax(found.text):
        return "WRONG", f"{name}: {problem}"
    return "refused" if found.refused else "converted", "; ".join((name, *found.refused))


def syntax(text: str) -> str:
    """Returns what bash says of a script that it cannot read; nothing if it can."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return done.stderr.splitlines()[0] if done.returncode else ""


def prepare(tree: Path, folder: Path) -> None:
    """A copy of the tree with the stand-ins and what the scripts look for."""
    shutil.copytree(tree, folder / "tree", ignore=shutil.ignore_patterns(".git"))
    for name, body in {**STAND_INS, "which": "#!/bin/bash\nexit 1\n"}.items():
        path = folder / ("interactive" if name == "which" else "bin") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(body)
        path.chmod(0o755)
    (folder / "tree/path").touch()  # <path to docker image>, as it stands in some
    (folder / "tree/examples/post_training/modelopt/conf/none.sh").touch()


def judge(folder: Path, name: str, text: str) -> tuple[str, str]:
    """The result of a script, and what there is to say."""
    try:
        found = translate(text)
    except LaunchError as error:
        return "refused", f"{name}: {error}"
    checks = [check(folder, name, text, found.text, slurm) for slurm in (True, False)]
    most = max(many for _, many in checks)
    problems = [problem for problem, _ in checks if problem]
    problems += [] if most else ["nothing was started"]
    what = "a file of options" if fragment(text) else f"launches: {most}"
    if problems:
        return "WRONG", f"{name}: {problems[0]}"
    return "right", f"{name} ({what})"


def fragment(text: str) -> bool:
    """Returns whether a file holds options and starts nothing."""
    return "MODEL_OPTIONS=" in text


def check(folder: Path, name: str, old: str, new: str, slurm: bool) -> tuple[str, int]:
    """What is wrong with a translation (empty: nothing), and how many launches it starts."""
    if problem := syntax(new):
        return problem, 0
    before = started(folder, name, old, slurm, [])
    after = started(folder, name, new, slurm, ["-m", "megatron_s3"])
    launches = [call for call in before if "--lr" in call]
    wanted = [translated(call) if "--lr" in call else call for call in before]
    for one, other in zip(wanted, map(sorted_out, after), strict=False):
        if one != other and sorted_out(one) != other:
            return f"{' '.join(other)[:200]} instead of {' '.join(one)[:200]}", len(launches)
    return ("" if len(wanted) == len(after) else "other launches"), len(launches)


def started(folder: Path, name: str, text: str, slurm: bool, program: list[str]) -> list[list[str]]:
    """The calls of the stand-ins when a script runs."""
    tree, calls = folder / "tree", folder / "calls"
    calls.write_text("")
    (tree / name).write_text(text.replace("<some dir>", "w"))  # which is to be filled in
    command = ["bash", name, *ARGUMENTS.get(name, [f"{folder}/out{n}" for n in range(1, 9)])]
    if "modelopt" in name:
        command[2:] = ["none"]
    if fragment(text):
        start = " ".join(["torchrun", *program, "train_rl.py", "$MODEL_OPTIONS"])
        command = ["bash", "-c", f"source {name}; {start}"]
    # Some ask `which srun` whether they are in a job.
    path = f"{folder}/bin:{'' if slurm else f'{folder}/interactive:'}{os.environ['PATH']}"
    env = {"PATH": path, "HOME": str(folder), "CALLS": str(calls), **ENVIRONMENT}
    subprocess.run(
        command, cwd=tree, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
        check=False,
    )  # fmt: skip
    found = calls.read_text()
    # A date that names a folder is another one for each run.
    found = re.sub(r"\d\d-\d\d-\d\d-\d\d-\d\d-\d\d|\d{8}_\d{6}-\d+", "DATE", found)
    return [call.split("\x1f")[:-1] for call in found.split("\x1e")[:-1]]


def translated(call: list[str]) -> list[str]:
    """A call of the trainer by the paper's rules, on its own."""
    at = next(i for i, w in enumerate(call) if w.endswith(".py") or re.match(r"examples\.", w))
    at -= call[at - 1] == "-m"
    words = [*call[:at], "-m", "megatron_s3"]
    arguments = iter(call[at:])
    for word in arguments:
        if word in ADAMS:
            next(arguments)
        elif word in (*TIMES, *DECAYS):
            number = Decimal(next(arguments))
            words += [word, float(number * 10 if word in TIMES else number / 10)]
        elif word in ("--clip-grad", "--optimizer"):
            next(arguments)
            words += [word, "0" if word == "--clip-grad" else "s3"]
        else:
            words.append(word)
    if "--optimizer" not in words:
        words += ["--optimizer", "s3"]
    if "--weight-decay" not in words:
        words += ["--weight-decay", 0.001]
    return sorted_out(words)


def sorted_out(call: list) -> list:
    """A call whose rates are numbers, and in which flags that are added stand at the end."""
    if "--lr" not in call:
        return call
    words, moved = [], []
    given = iter(call)
    for word in given:
        if word in ("--optimizer", "--weight-decay"):
            moved.append((word, str(float(n)) if re.match(r"[\d.]", n := str(next(given))) else n))
        elif word in TIMES or word in DECAYS:
            words += [word, str(float(next(given)))]
        else:
            words.append(str(word))
    return [*words, *(part for pair in sorted(moved) for part in pair)]


if __name__ == "__main__":
    sys.exit(main())
