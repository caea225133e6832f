"""Submission of a configuration: sbatch's options, and the job's script from scripts/.

A job runs exactly what was checked and chosen when it was submitted, whenever and however often it
starts: it gets a copy of the configuration, and a copy of the script that holds the settings.
"""

import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_s3.errors import MegatronS3Error
from megatron_s3.launch import private
from megatron_s3.launch.config import COPY, Config
from megatron_s3.launch.config_paths import shipped
from megatron_s3.launch.redact import is_secret, redact_word

__all__ = ["SlurmError", "command", "submit"]

#: Variables that the script reads from its environment (see its head), with their forms.
_SETTINGS = {
    "CONTAINER": r"(pyxis|apptainer):.+",
    "MOUNTS": r".+",
    "MAX_REQUEUES": r"[0-9]+",
    "PREFLIGHT": r"[01]",
    "PREFLIGHT_TIMEOUT": r"(?=.*[1-9])[0-9]+(\.[0-9]*)?",
    "MIN_FREE_GIB": r"[0-9]+(\.[0-9]*)?",
}


class SlurmError(MegatronS3Error):
    """Raised if the job cannot be submitted; the message says why."""


def body() -> Path:
    """Returns the job's script in this package."""
    return shipped().parent / "scripts" / "pretrain.sbatch"


def command(config: Config, words: list[str], run_dir: Path, tasks: int) -> list[str]:
    """Returns the sbatch command line.

    Args:
        config: the source of nodes, time and further options of sbatch, which override those set
            here.
        words: arguments of ``megatron-s3 launch`` on the nodes: files and overrides.
        run_dir: where the job writes.
        tasks: number of runs in the array, or 0 for a single job.
    """
    folder = run_dir.absolute()
    options: dict[str, str | None] = {
        "job-name": config.name,
        "nodes": str(config.launch.nodes),
        # A percent sign of the folder is none of sbatch's patterns.
        "output": f"{folder}/".replace("%", "%%")
        + ("slurm-%A_%a.out" if tasks else "slurm-%j.out"),
        "open-mode": "append",
        "chdir": os.getcwd(),
    }
    if config.launch.time:
        options["time"] = config.launch.time
    asks_for_gpus = any(name.startswith(("gpus", "gres")) for name in config.launch.sbatch)
    if config.arguments.get("plugin_device", "cuda") != "cpu" and not asks_for_gpus:
        options["gpus-per-node"] = str(config.launch.nproc_per_node)
    if tasks:
        options["array"] = f"0-{tasks - 1}"
    options |= config.launch.sbatch
    given = [
        f"--{name}={value}" if value else f"--{name}"
        for name, value in options.items()
        if value is not None
    ]
    return ["sbatch", *given, str(folder / body().name), *words]


def submit(config: Config, run_dir: Path, tasks: int, dry_run: bool) -> int:
    """Submits a configuration that has been checked.

    Args:
        config: the configuration of all runs of an array.
        run_dir: where the job writes.
        tasks: number of runs in the array, or 0 for a single job.
        dry_run: whether to print the command and do nothing else.

    Raises:
        SlurmError: sbatch is not installed or fails, the run's folder cannot be written, a setting
            has a wrong value, or a credential would not reach the job.
    """
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    copy = run_dir.absolute() / "submitted" / now / f"{config.name}.yaml"
    line = command(config, [str(copy)], run_dir, tasks)
    shown = shlex.join(map(redact_word, line))
    settings = _settings(run_dir)
    secrets = _secrets(config)
    given = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    print(" ".join([*given, shown]), flush=True)  # before sbatch's output
    if dry_run:
        return 0
    if not shutil.which("sbatch"):
        raise SlurmError("sbatch is not installed on this machine; submit from a login node")
    try:
        copy.parent.mkdir(parents=True)
        private.write(copy, f"{COPY}\n{config.yaml(whole=True)}")
        private.write(run_dir / body().name, _script(config, settings))
        private.append(run_dir / "submitted.txt", shown + "\n")
    except OSError as error:
        raise SlurmError(f"cannot write to {run_dir}: {error}") from error
    # Variables of another job, if this runs inside one.
    foreign = ("MASTER_ADDR", "MASTER_PORT") if "SLURM_JOB_ID" in os.environ else ()
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    run = subprocess.run(line, env=environment | settings | secrets)
    if run.returncode:
        raise SlurmError(f"sbatch failed with status {run.returncode}; its message is above")
    return 0


def _settings(run_dir: Path) -> dict[str, str]:
    """Returns the script's variables and their values here.

    Raises:
        SlurmError: one has a value that the script or the preflight would reject.
    """
    settings = {"RUN_DIR": str(run_dir.absolute())}
    settings |= {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)}
    for name, form in _SETTINGS.items():
        if name in settings and not re.fullmatch(form, settings[name], re.DOTALL):
            raise SlurmError(
                f"{name}={settings[name]}: the job cannot use this value; see the settings in the "
                f"head of {body()}"
            )
    if not settings.get("CONTAINER"):
        settings["VENV"] = os.path.abspath(os.environ.get("VENV") or sys.prefix)
        if not any(
            os.access(f"{settings['VENV']}/bin/{p}", os.X_OK) for p in ("python", "python3")
        ):
            raise SlurmError(
                f"VENV={settings['VENV']} has no bin/python; set VENV to the virtual environment "
                "of the job, or unset it to use the current one"
            )
    if os.environ.get("PYTHONPATH") and "CONTAINER" not in settings:
        settings["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return settings


def _secrets(config: Config) -> dict[str, str]:
    """Returns the ranks' credentials, which reach the job only as environment variables."""
    environment = config.launch.environment
    secrets = {name: value for name, value in environment.items() if is_secret(name, value)}
    export = config.launch.sbatch.get("export") or os.environ.get("SBATCH_EXPORT") or "ALL"
    passed = export.split(",")
    lost = [name for name in secrets if name not in passed and "ALL" not in map(str.upper, passed)]
    if lost:
        raise SlurmError(
            f"{', '.join(lost)}: credentials are not written to the job's files, and "
            f"--export={redact_word(export)} does not pass them to the job; add their names to "
            "it, separated by commas (launch.sbatch.export, or SBATCH_EXPORT), or set them on "
            "the nodes"
        )
    return secrets


def _script(config: Config, settings: dict[str, str]) -> str:
    """Returns the script with the settings in it, and without unwanted options."""
    text = body().read_text(encoding="utf-8")
    for name, value in config.launch.sbatch.items():
        if value is None:
            text = re.sub(
                rf"^#SBATCH --{re.escape(name)}(?=[=\s]).*\n", "", text, flags=re.MULTILINE
            )
    begin = "\nset -euo pipefail\n"
    assert text.count(begin) == 1
    given = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
    head = "\n# Settings from the submission; they override the environment.\n"
    return text.replace(begin, head + given + begin)
