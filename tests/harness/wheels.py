"""Sources of frameworks that are not installed: read from their wheels, beside the tree."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

__all__ = ["functions", "source"]

#: Downloaded once; nothing of it is committed.
CACHE = Path(__file__).parents[2] / ".venv" / "wheels"


def _wheel(package: str, version: str) -> Path:
    """Downloads a wheel without its dependencies; skips the test where the index has none."""
    folder = CACHE / f"{package}-{version}"
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
        command += ["--no-deps", "--dest", str(folder), f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"{package} {version} cannot be downloaded: {reason}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def source(package: str, version: str, path: str) -> str:
    """Returns the text of a module in a package's wheel; skips the test where there is none."""
    with zipfile.ZipFile(_wheel(package, version)) as archive:
        return archive.read(path).decode()


def functions(text: str, *names: str, **globals_: Any) -> dict[str, Any]:
    """Returns functions of a module, without importing it.

    Args:
        text: of the module.
        names: of the functions.
        **globals_: what the functions find under the names that their module imports.
    """
    tree = ast.parse(text)
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    assert {node.name for node in found} == set(names)
    space = dict(globals_)
    exec(compile(ast.Module(found, []), "<wheel>", "exec"), space)
    return space
