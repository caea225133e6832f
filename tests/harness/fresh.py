"""Programs in processes into which neither Megatron nor the plugin has been imported.

They are forks of one process that has imported torch, with the parts of it that Megatron imports.
That takes several times as long as what follows.  What a test has to say about torch's own import
needs ``subprocess`` and :data:`sys.executable`.
"""

import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import types
from pathlib import Path

from .forks import Forks

__all__ = ["run"]


@functools.cache
def _forks() -> Forks:
    return Forks(imports="torch")


def run(
    *words: object, env: dict[str, str] | None = None, cwd: str | Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program and waits for it, as ``subprocess.run([sys.executable, *words])`` does.

    Args:
        *words: ``-c CODE`` or ``-m MODULE``, and the program's own arguments.
        env: its whole environment; this process's if None.
        cwd: its working directory; this process's if None.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "words": [str(word) for word in words],
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or os.getcwd()),
        }
        Path(folder, "request").write_text(json.dumps(request))
        status = _forks().run([folder], 1, os.devnull, program=__name__)
        said = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(words, status, *said)


def _main(folder: str) -> None:
    """Makes the fork as new as one can be, and runs the program in it."""
    request = json.loads(Path(folder, "request").read_text())
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
    added = [*os.environ["PYTHONPATH"].split(os.pathsep), os.getcwd()]
    os.environ.clear()
    os.environ |= request["env"]
    os.chdir(request["cwd"])
    kind, program, *argv = request["words"]
    assert kind in ("-c", "-m"), kind
    path = ["" if kind == "-c" else os.getcwd()]
    path += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [*path, *(p for p in sys.path if p not in added)]
    for name in list(sys.modules):
        if name.partition(".")[0] in ("megatron_s3", "tests"):
            del sys.modules[name]
    sys.argv = [kind, *argv]
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        raise


if __name__ == "__main__":
    _main(sys.argv[1])
