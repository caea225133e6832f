"""``python -m megatron_s3 SCRIPT ARGS``."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_s3 import __main__ as entry

SCRIPT = """
import sys
import neighbour

print(__name__, sys.argv, neighbour.NAME)
sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("NAME = 'beside the script'\n")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The device and the command line that each call of ``register`` saw."""
    seen: list[list[str]] = []
    monkeypatch.setattr(entry, "register", lambda device: seen.append([device, *sys.argv]))
    monkeypatch.setattr(sys, "argv", ["megatron_s3"])
    monkeypatch.setattr(sys, "path", ["cwd", *sys.path])
    return seen


def test_runs_the_script_as_python_would(script, registered, capsys) -> None:
    argv = [str(script), "--optimizer", "s3", "3"]
    with pytest.raises(SystemExit) as left:
        entry.main(argv)
    assert left.value.code == 3
    assert capsys.readouterr().out == f"__main__ {argv} beside the script\n"
    assert registered == [["auto", *argv]]
    assert sys.path[0] == str(script.parent)
    assert "cwd" not in sys.path


def test_missing_script_is_one_clear_line(registered, capsys) -> None:
    assert entry.main(["nowhere/pretrain_gpt.py", "--optimizer", "s3"]) == 2
    assert capsys.readouterr().err == "[megatron_s3] no such script: nowhere/pretrain_gpt.py\n"
    assert not registered


def test_runs_a_module_as_python_would(script, registered, capsys, monkeypatch) -> None:
    package = script.parent / "trainer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "run.py").write_text(script.read_text())
    monkeypatch.chdir(script.parent)
    with pytest.raises(SystemExit) as left:
        entry.main(["-m", "trainer.run", "--optimizer", "s3", "3"])
    assert left.value.code == 3
    assert capsys.readouterr().out.startswith("__main__ ['")
    assert registered == [["auto", "trainer.run", "--optimizer", "s3", "3"]]
    assert sys.path[0] == str(script.parent)


def test_missing_module_is_one_clear_line(registered, capsys) -> None:
    for name in ("nowhere", "nowhere.at.all"):
        assert entry.main(["-m", name, "--optimizer", "s3"]) == 2
        assert capsys.readouterr().err == f"[megatron_s3] no such module: {name}\n"
    assert entry.main(["-m"]) == 2
    assert not registered


def test_no_arguments_show_the_usage(registered, capsys) -> None:
    assert entry.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: torchrun [...] -m megatron_s3 SCRIPT")


def test_help() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "megatron_s3", "--help"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0
    assert run.stdout.startswith("usage: torchrun [...] -m megatron_s3 SCRIPT")
