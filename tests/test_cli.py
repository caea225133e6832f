"""``megatron-s3 VERB``: what it says before a verb's module is there."""

import importlib
import io
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megatron_s3 import cli


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_missing_package_is_one_line(verb: str, monkeypatch, capsys) -> None:
    def missing(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'megatron.core'", name="megatron.core")

    monkeypatch.setattr(importlib, "import_module", lambda _: types.SimpleNamespace(main=missing))
    assert cli.main([verb, "x"]) == 2
    *said, error = capsys.readouterr().err.splitlines()
    assert error == (
        f"error: megatron-s3 {verb} needs megatron, which is not installed here (No module named "
        "'megatron.core'): pip install 'megatron-s3[megatron]'"
    )
    assert said == (["[megatron_s3] loading PyTorch"] if verb in ("convert", "export") else [])


def test_a_module_of_ones_own_that_is_missing_stays_a_fault(monkeypatch) -> None:
    def broken(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'megatron_s3.x'", name="megatron_s3.x")

    monkeypatch.setattr(importlib, "import_module", lambda _: types.SimpleNamespace(main=broken))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["data"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_the_output_cannot_spell_ends_no_work(encoding: str, monkeypatch) -> None:
    def told(argv: list[str]) -> int:
        print(*argv)
        return 0

    monkeypatch.setattr(importlib, "import_module", lambda _: types.SimpleNamespace(main=told))
    with io.TextIOWrapper(io.BytesIO(), encoding=encoding) as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main(["report", "runs/é-北"]) == 0
        output.flush()
        written = output.buffer.getvalue()
    spelled = {"ascii": r"\xe9-\u5317", "latin-1": r"é-\u5317", "utf-8": "é-北"}[encoding]
    assert written.decode(encoding) == f"runs/{spelled}\n"


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (
            OSError(28, "No space left", "x"),
            1,
            "error: megatron-s3 plan: [Errno 28] No space left: 'x'\n",
        ),
    ],
)
def test_an_interrupt_and_a_full_disk_print_no_traceback(
    monkeypatch, capsys, raised: BaseException, status: int, said: str
) -> None:
    def fails(argv: list[str]) -> int:
        raise raised

    monkeypatch.setattr(importlib, "import_module", lambda _: types.SimpleNamespace(main=fails))
    assert cli.main(["plan"]) == status
    assert capsys.readouterr().err == said


def test_a_reader_that_has_enough_is_no_fault() -> None:
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", "megatron_s3.cli", "launch", "tiny-s3", "--print-run-dir"],
        stdout=write, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    os.close(write)
    assert (run.returncode, run.stderr) == (1, "")


def test_a_verb_speaks_whatever_rank_the_environment_names(monkeypatch, capsys) -> None:
    """A pod, or a program under torchrun, may have set it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(
        importlib, "import_module", lambda _: types.SimpleNamespace(main=lambda argv: 0)
    )
    assert cli.main(["convert"]) == 0
    assert capsys.readouterr().err == "[megatron_s3] loading PyTorch\n"


#: A verb that is given a path of the wrong kind, and the line that it prints.
WRONG_PATHS = [
    ("launch folder", "folder: it is a folder, not a file; give one YAML file of it"),
    (
        "launch zzz",
        "zzz: no such file or shipped configuration; megatron-s3 configs lists the names",
    ),
    ("launch latin.txt", "latin.txt: cannot be read: it is not text in UTF-8 (byte 0)"),
    ("args folder", "folder: cannot be read: it is a folder, not a file"),
    ("args none", "none: cannot be read: no such file"),
    ("args latin.txt", "latin.txt: cannot be read: it is not text in UTF-8 (byte 0)"),
    (
        "convert text.txt out --to s3",
        "text.txt: it is a file, not a folder; name the folder of the run's --save",
    ),
    (
        "convert folder out --to s3",
        "folder: it holds no checkpoint, neither latest_checkpointed_iteration.txt nor an "
        "iter_XXXXXXX; name the folder of the run's --save (of a launched run, "
        "runs/NAME/checkpoints)",
    ),
    (
        "convert folder out --to s3 --iteration 20",
        "folder: it holds no checkpoint, neither latest_checkpointed_iteration.txt nor an "
        "iter_XXXXXXX; name the folder of the run's --save (of a launched run, "
        "runs/NAME/checkpoints)",
    ),
    (
        "convert folder text.txt/out --to s3",
        "text.txt: it is a file, not a folder; make it first",
    ),
    ("report none", "none: no such folder; give the folder of a run, such as runs/NAME"),
    (
        "report text.txt",
        "text.txt, line 1: damaged: not a record of a run; a log of a run (metrics.jsonl) begins "
        "with one",
    ),
    ("eval none --output o", "none: no such folder; give the folder that megatron-s3 export wrote"),
    (
        "data --input . --output-prefix x --tokenizer text.txt",
        "--tokenizer text.txt: it is a file, not a folder; give gpt2, bytes, or the folder of a "
        "Hugging Face tokenizer",
    ),
]


@pytest.mark.parametrize(("line", "said"), WRONG_PATHS, ids=[line for line, _ in WRONG_PATHS])
def test_a_path_of_the_wrong_kind_is_told_from_one_that_is_missing(
    line: str, said: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("text.txt").write_text("hello\n")
    Path("latin.txt").write_bytes(b"\xff\n")
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {said}"


def test_a_verb_without_its_configuration_asks_for_that_alone(capsys) -> None:
    """Further files are optional; argparse named them as required."""
    for verb in ("launch", "plan"):
        with pytest.raises(SystemExit):
            cli.main([verb])
        assert capsys.readouterr().err.endswith("are required: config\n")
