"""The shell scripts: what they refuse, and that they install once."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL, **options
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts"))
    if not shellcheck:
        pytest.skip("shellcheck is not installed beside this Python")
    done = run(shellcheck, "-x", script.relative_to(ROOT), cwd=ROOT)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_scripts_that_are_called_can_be_executed() -> None:
    for script in SCRIPTS:
        assert os.access(script, os.X_OK) == (not script.name.startswith("_")), script


@pytest.fixture
def nothing_installs(tmp_path: Path) -> dict[str, str]:
    """An environment in which the scripts fail, should they go on to install or to run anything."""
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MEGATRON_S3_PYTHON": "/bin/false"}


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh"])
def test_help(name: str, nothing_installs: dict[str, str], tmp_path: Path) -> None:
    done = run(ROOT / "scripts" / name, "--help", env=nothing_installs, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: ./scripts/{name}" in done.stdout
    assert "MEGATRON_S3_PYTHON" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--itres", "5"], "unknown argument --itres"), (["--out"], "--out needs a value")],
)
def test_wrong_arguments_are_refused_before_anything_is_installed(
    arguments: list[str], said: str, nothing_installs: dict[str, str], tmp_path: Path
) -> None:
    done = run(ROOT / "scripts" / "quickstart.sh", *arguments, env=nothing_installs, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {said}; see ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--iters", "9"], "--iters 9"),
        (["--iters=x"], "--iters"),
        (["--nproc", "3"], "--nproc 3"),
        (["--input", "nowhere"], "--input nowhere"),
    ],
)
def test_values_that_cannot_be_are_refused(arguments: list[str], said: str, tmp_path: Path) -> None:
    environment = {**os.environ, "MEGATRON_S3_PYTHON": sys.executable}
    done = run(ROOT / "scripts" / "quickstart.sh", *arguments, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_python_that_fits(tmp_path: Path) -> None:
    done = run(
        shutil.which("bash") or "bash",
        "-c",
        f". {ROOT}/scripts/_venv.sh; _find_python",
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "no Python 3.12 or 3.13" in done.stderr
    assert "pyenv install 3.12" in done.stderr


def test_packages_are_installed_once_and_again_when_the_pins_change(tmp_path: Path) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n[ ! -e {tmp_path}/broken ]\n')
    python.chmod(0o755)
    pins = tmp_path / "pyproject.toml"
    pins.write_text("a")
    calls = tmp_path / "calls"
    code = f'set -e; . {ROOT}/scripts/_venv.sh; ensure_venv one,two; echo "$PYTHON"'

    def installs() -> int:
        calls.write_text("")
        environment = {k: v for k, v in os.environ.items() if k != "MEGATRON_S3_PYTHON"}
        done = run("bash", "-c", code, cwd=tmp_path, env=environment)
        made = calls.read_text().splitlines()
        assert all(call.endswith("-e .[one,two]") for call in made)
        if done.returncode == 0:
            assert done.stdout.splitlines()[-1] == str(python)
        return len(made) if done.returncode == 0 else -1

    assert [installs(), installs()] == [1, 0]
    pins.write_text("b")
    (tmp_path / "broken").touch()
    assert [installs(), installs()] == [-1, -1]
    (tmp_path / "broken").unlink()
    assert [installs(), installs()] == [1, 0]


def test_modules_are_compiled_once_where_no_bytecode_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "pyproject.toml").touch()
    pins = subprocess.run(["sha256sum", "pyproject.toml"], cwd=tmp_path, stdout=subprocess.PIPE)
    (tmp_path / ".venv" / "installed-one").write_bytes(pins.stdout)
    (tmp_path / "some_module.py").touch()
    code = f'set -e; . {ROOT}/scripts/_venv.sh; ensure_venv one; "$PYTHON" -c "import some_module"'
    others = ("MEGATRON_S3_PYTHON", "PYTHONPYCACHEPREFIX")
    environment = {k: v for k, v in os.environ.items() if k not in others}
    environment |= {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = run("bash", "-c", code, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("__pycache__/some_module.*.pyc"))) == 1
