"""MEGATRON_S3=1: registered when Megatron is imported, by a file that Python runs at its start."""

import os
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tomllib

from megatron_s3 import autoregister, cli
from tests.harness import fresh


@pytest.fixture
def hook(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "site" / "megatron_s3_hook.pth"
    path.parent.mkdir()
    monkeypatch.setattr(autoregister, "file", lambda: path)
    assert cli.main(["hook", "status"]) == 1
    assert cli.main(["hook", "install"]) == 0
    assert cli.main(["hook", "status"]) == 0
    return path


def run(
    hook: Path, code: str, anew: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """Runs code in a process whose packages' folder is the hook's, if asked without torch."""
    # What site does at the start of a process.
    head = f"import site, sys, warnings; site.addsitedir({str(hook.parent)!r})\n"
    head += "warnings.simplefilter('ignore')\n"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEGATRON_S3")}
    words = ("-c", head + textwrap.dedent(code))
    if anew:
        command = [sys.executable, *words]
        return subprocess.run(command, capture_output=True, text=True, env=kept | environment)
    return fresh.run(*words, env=kept | environment)


def test_a_program_that_does_not_name_the_plugin_has_it(hook, tmp_path):
    """Whatever it takes from Megatron, however; in another framework's module, too."""
    (hook.parent / "framework.py").write_text(
        "from megatron.core.optimizer import get_megatron_optimizer\n"
    )
    code = """
        assert "megatron_s3.autoregister" in sys.modules and "torch" not in sys.modules
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        import framework, torch
        assert OptimizerConfig(optimizer="s3", s3_p=2.0).clip_grad == 0.0
        for function in (get_megatron_optimizer, framework.get_megatron_optimizer):
            assert hasattr(function, "__megatron_s3_seam__")
        assert not torch.cuda.is_available()  # no device was chosen
        import megatron.training.arguments as later
        assert hasattr(later.validate_args, "__megatron_s3_seam__")
        import importlib
        importlib.reload(later)  # and the finder is out of the way
    """
    done = run(hook, code, anew=True, MEGATRON_S3="1")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_device_is_chosen_before_megatron_is_imported(hook):
    code = """
        import megatron.core
        from megatron_s3.mcore import cpu_device
        assert cpu_device.active()
    """
    done = run(hook, code, MEGATRON_S3="1", MEGATRON_S3_DEVICE="cpu")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("value", [None, "0"])
def test_without_the_variable_nothing_is_imported(hook, value):
    code = """
        import megatron.core.optimizer as optimizer
        assert not [name for name in sys.modules if name.startswith("megatron_s3")]
        assert not hasattr(optimizer.get_megatron_optimizer, "__megatron_s3_seam__")
    """
    done = run(hook, code, **({} if value is None else {"MEGATRON_S3": value}))
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_process_that_never_imports_megatron_imports_nothing_for_it(hook):
    code = """
        import json
        ours = {name for name in sys.modules if name.startswith("megatron_s3")}
        assert ours <= {"megatron_s3", "megatron_s3.version", "megatron_s3.autoregister",
                        "megatron_s3.errors", "megatron_s3.log"}, ours
        assert "torch" not in sys.modules
    """
    done = run(hook, code, anew=True, MEGATRON_S3="1")
    assert done.returncode == 0, done.stderr[-3000:]


def test_another_value_is_refused_where_megatron_is_imported(hook):
    done = run(hook, "import json; print('before'); import megatron.core", MEGATRON_S3="yes")
    assert done.returncode == 1 and done.stdout == "before\n"
    assert done.stderr.strip().endswith("or 0; change or unset it")
    assert "MEGATRON_S3=yes: expected 1" in done.stderr


def test_removed_it_is_gone(hook):
    assert cli.main(["hook", "remove"]) == 0 and not hook.exists()
    assert cli.main(["hook", "remove"]) == 0


@pytest.mark.parametrize("action", ["install", "remove"])
def test_an_environment_that_cannot_be_changed_is_said_in_one_line(
    action, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "megatron_s3_hook.pth"
    monkeypatch.setattr(autoregister, "file", lambda: path)
    assert cli.main(["hook", action]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} cannot be changed (Not a directory). Use an envir")


def test_verl_finds_it_among_its_plugins(monkeypatch):
    """verl loads each entry point of the group while it is imported, in each process."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["verl.plugins"].items()
    point = EntryPoint(name, value, "verl.plugins")
    before = list(sys.meta_path)
    monkeypatch.setattr(sys, "meta_path", before)
    monkeypatch.delitem(sys.modules, "megatron_s3.verl_plugin", raising=False)
    monkeypatch.delenv("MEGATRON_S3", raising=False)
    point.load()
    count = len(sys.meta_path)
    monkeypatch.delitem(sys.modules, "megatron_s3.verl_plugin")
    monkeypatch.setenv("MEGATRON_S3", "1")
    point.load()
    assert len(sys.meta_path) == count + 1
    autoregister.start()
    assert len(sys.meta_path) == count + 1
