"""Record of a run: command, configuration, code, packages, environment and machine."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import megatron_s3
from megatron_s3.launch import private
from megatron_s3.launch.commands import first_node
from megatron_s3.launch.config import Config
from megatron_s3.launch.redact import environment, redact, redact_word
from megatron_s3.log import say_here

__all__ = ["record"]


def record(run_dir: Path, config: Config, command: list[str]) -> None:
    """Writes the record of an attempt; each node writes its own facts, the first one all others.

    ``RUN/config.yaml`` is the configuration of the newest attempt; differences from the one before
    are logged. ``RUN/provenance/ATTEMPT/`` holds ``command.txt``, ``config.yaml``,
    ``packages.txt``, ``environment.txt``, ``code.txt``, ``code.diff`` and ``node-HOST.json``. Only
    the user can read them, and they contain no value that may be a credential.

    Raises:
        OSError: the record cannot be written.
    """
    attempt = run_dir / "provenance" / _attempt()
    attempt.mkdir(parents=True, exist_ok=True)
    host = platform.node()
    private.write(attempt / f"node-{host}.json", json.dumps(_node(), indent=2) + "\n")
    if not first_node():
        return
    resolved = config.yaml()
    _say_changes(run_dir / "config.yaml", resolved)
    # A package with broken metadata has no name.
    packages = {d.name: d.version for d in importlib.metadata.distributions() if d.name}
    code, difference = _code()
    files = {
        "config.yaml": resolved,
        "command.txt": shlex.join(map(redact_word, command)) + "\n",
        "packages.txt": "".join(
            f"{name}=={version}\n" for name, version in sorted(packages.items())
        ),
        "environment.txt": environment(),
        "code.txt": code,
    }
    if difference:
        files["code.diff"] = redact(difference)
    for name, text in files.items():
        private.write(attempt / name, text)
    private.write(run_dir / "config.yaml", resolved)


def _attempt() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    if job:  # equal on all nodes
        return f"job-{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")


def _say_changes(path: Path, resolved: str) -> None:
    """Logs which values differ from those of the last attempt."""
    if not path.is_file():
        return
    before, now = _values(path.read_text(encoding="utf-8", errors="replace")), _values(resolved)
    if before != now:
        gone, new = ", ".join(sorted(before - now)), ", ".join(sorted(now - before))
        say_here(
            f"the configuration changed since the last attempt: {gone or 'not set'} -> "
            f"{new or 'not set'}"
        )


def _values(text: str) -> set[str]:
    """Returns the settings of a YAML configuration as ``name: value``."""
    try:
        # Values as they are written.
        sections = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return set()

    def flat(values: Any) -> Iterator[str]:
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, dict):
                yield from flat(value)
            else:
                yield f"{name}: {value}"

    return set(flat(sections))


def _code() -> tuple[str, str]:
    """Returns the plugin's version and commit, and the changes since the commit."""
    here = Path(megatron_s3.__file__).parents[1]
    lines = [f"megatron_s3 {megatron_s3.__version__} ({here})", f"python {sys.version}"]
    commit = (
        _output("git", "-C", str(here), "rev-parse", "HEAD") if (here / ".git").exists() else ""
    )
    if not commit:
        return "\n".join(lines) + "\n", ""
    lines.append(f"commit {commit}")
    difference = _output("git", "-C", str(here), "diff", "HEAD")
    lines.append("changed since the commit: see code.diff" if difference else "nothing changed")
    return "\n".join(lines) + "\n", difference


def _node() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "host": platform.node(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if shutil.which("nvidia-smi"):
        query = "name,memory.total,driver_version,uuid"
        gpus = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        facts["gpus"] = gpus.splitlines()
    return facts


def _output(*command: str) -> str:
    """Returns the output of a command; empty if it cannot run or fails."""
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, errors="surrogateescape", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
