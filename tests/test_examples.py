"""The examples in pages and in heads of files work as they stand."""

import argparse
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_s3 import cli, data
from megatron_s3.launch import launch
from megatron_s3.launch.check import arithmetic
from megatron_s3.launch.config import load
from scripts.docs import pages

REPOSITORY = Path(__file__).parents[1]
PAGES = pages.pages(REPOSITORY)

#: What the scripts start with their own arguments, which they do not look at.
_BEHIND = {
    "./scripts/quickstart.sh": "megatron_s3.quickstart",
    "./scripts/reproduce.sh": "scripts.experiments.runner",
}


def _commands(text: str) -> list[str]:
    """Commands in blocks of sh and between backquotes, continued lines joined.

    Without generated parts, and without the blocks that are marked as runnable, which
    tests/scripts/test_docs.py runs.
    """
    text = re.sub(r"^<!-- runnable -->\n```sh\n.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^<!-- generated: .*?^<!-- end -->", "", text, flags=re.M | re.S)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [" ".join(line.split("#")[0].split()) for line in [*lines, *inline]]


def _examples() -> list[str]:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    found = [c for text in texts for c in _commands(text)]
    # Files that a reader writes before, with an optimizer of their own; a test of the optimizers'
    # packages does the same (tests/optimizers/test_example.py).
    written = {name for text in texts for name in re.findall(r"^cat > (\S+) <<", text, re.M)}
    found = [c for c in found if not written & set(c.split())]
    head = (REPOSITORY / "scripts/pretrain.sbatch").read_text().split("\n\n")[0]
    head = re.sub(r"^# ?", "", head, flags=re.MULTILINE).replace("\\\n", " ")
    found += [" ".join(line.split()) for line in head.splitlines() if line.startswith("    sbatch")]
    starts = ("megatron-s3 ", "python ", "./scripts/", "sbatch ")
    examples = [c for c in dict.fromkeys(found) if c.startswith(starts) and "..." not in c]
    # A verb that needs arguments, and stands alone, is its name.
    names = {f"megatron-s3 {verb}" for verb in cli.VERBS if verb != "configs"}
    # Other projects' programs take their arguments in ways of their own.
    ours = ("scripts.", "tests.", "megatron_s3.", "pytest tests")
    return [
        c
        for c in examples
        if c not in names and (not c.startswith("python ") or c[10:].startswith(ours))
    ]


class _Parsed(Exception):
    pass


@pytest.fixture
def parsed(monkeypatch):
    """Runs a program up to where it has accepted its arguments."""

    def check(words: list[str], start) -> None:
        for name in ("parse_args", "parse_intermixed_args"):
            parse = getattr(argparse.ArgumentParser, name)

            def stop(self, *args, _parse=parse, **kwargs):
                _parse(self, *args, **kwargs)
                raise _Parsed

            monkeypatch.setattr(argparse.ArgumentParser, name, stop)
        monkeypatch.setattr(sys, "argv", words)
        try:
            status = start()
        except _Parsed:
            return
        except SystemExit as end:
            status = end.code
        assert not status

    return check


@pytest.fixture
def _with_data(monkeypatch):
    """Every dataset that an example names is there."""
    words = ["--train-data-path", "a", "--valid-data-path", "b"]
    monkeypatch.setattr(data, "megatron_arguments", lambda prefix: words)


@pytest.mark.usefixtures("_with_data")
@pytest.mark.parametrize("example", _examples())
def test_an_example_is_accepted(example, parsed, tmp_path, monkeypatch) -> None:
    """Parsed by the program that it starts; a launch is checked, but for what Megatron says to it.

    (That is the same for all configurations that are shipped, which have a test of their own.)
    """
    words = shlex.split(example)
    words = words[: words.index(">")] if ">" in words else words
    words = ["2" if word == "N" else word for word in words]  # where a letter stands for a number
    if words[:3] == ["python", "-m", "pytest"]:
        paths = [REPOSITORY / word for word in words[3:] if word.startswith("tests")]
        assert paths and all(path.exists() for path in paths)
    elif words[0] == "python" and words[1] == "-m":
        parsed(words[2:], lambda: _run(runpy.run_module, words[2]))
    elif words[0] == "python":
        path = str(REPOSITORY / words[1])
        monkeypatch.syspath_prepend(REPOSITORY / "scripts")
        parsed([path, *words[2:]], lambda: _run(runpy.run_path, path))
    elif words[0] in _BEHIND:
        parsed(words, lambda: importlib.import_module(_BEHIND[words[0]]).main(words[1:]))
    elif words[0] == "sbatch":
        at = words.index("scripts/pretrain.sbatch")
        options = dict(word[2:].partition("=")[::2] for word in words[1:at])
        _launch(words[at + 1 :], options, tmp_path, monkeypatch)
    elif words[:2] == ["megatron-s3", "launch"]:
        words = [word for word in words[2:] if word != "--slurm"]
        _launch(words, {}, tmp_path, monkeypatch)
    elif words[0] == "megatron-s3":
        parsed(words, lambda: cli.main(words[1:]))
        if words[1] == "plan" and words[2] != "CONFIG":
            files = [word for word in words[2:] if "/" in word or word.startswith("gpt2")]
            arithmetic(load(files))


def _run(start, program: str) -> None:
    start(program, run_name="__main__")


def _launch(words: list[str], options: dict[str, str], folder: Path, monkeypatch) -> None:
    if words[0] == "CONFIG":
        return
    monkeypatch.setattr(launch, "ask_megatron", lambda *args: None)
    monkeypatch.setenv("RUN_DIR", str(folder / "run"))
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", options.get("nodes", ""))
    if not options:
        monkeypatch.delenv("SLURM_JOB_NUM_NODES")
    assert launch.main([*words, "--dry-run"]) == 0
    values = {words.index("--run-dir") + 1} if "--run-dir" in words else set()
    given = [w for i, w in enumerate(words) if not w.startswith("--") and i not in values]
    sets = [word for word in given if "=" in word]
    config = load([word for word in given if "=" not in word], sets)
    assert options.get("gpus-per-node", config.launch.nproc_per_node) in (
        config.launch.nproc_per_node,
        str(config.launch.nproc_per_node),
    )


def test_the_tiny_model_trains_on_text_as_its_file_says(tmp_path) -> None:
    """A dataset brings its own tokenizer, which wins over the configuration's."""
    text = (REPOSITORY / "configs/models/tiny.yaml").read_text()
    (words,) = re.findall(r"# (--set .*) for real text$", text, re.MULTILINE)
    prefix = tmp_path / "text"
    (tmp_path / "in.jsonl").write_text('{"text": "some words of a text"}\n' * 200)
    source = ["data", "--input", str(tmp_path / "in.jsonl"), "--tokenizer", "bytes"]
    assert cli.main([*source, "--output-prefix", str(prefix)]) == 0
    given = shlex.split(words.replace("PREFIX", str(prefix)))
    words = ["tiny-s3", *given, "--run-dir", str(tmp_path / "run"), "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_s3.cli", "launch", *words],
        capture_output=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout.splitlines()[-1])
    assert "--mock-data" not in command
    last = len(command) - 1 - command[::-1].index("--vocab-size")
    assert command[last + 1] == "257"
    assert command[command.index("--train-data-path") + 1] == f"{prefix}_train"
