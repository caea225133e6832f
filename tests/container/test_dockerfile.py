import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import tomllib

from megatron_s3.cli import VERBS
from tests.container.images import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"


def test_hadolint_finds_nothing():
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pins_the_megatron_core_that_was_tested():
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    tested = next(p for p in pins["quickstart"] if p.startswith("megatron-core==")).split("==")[1]
    given = re.findall(r"^ARG MEGATRON_CORE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert given == [tested, tested]


def test_takes_into_the_build_what_the_wheel_needs():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:].partition("/")[0] for line in lines if line.startswith("!")}
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {Path(folder).parts[0] for folder in setuptools.get("package-dir", {}).values()}
    assert {"pyproject.toml", "megatron_s3", *folders} <= kept


@pytest.fixture
def entrypoint(tmp_path):
    """Runs docker/entrypoint.sh with a megatron-s3 that prints its arguments and HOME."""
    program = tmp_path / "bin" / "megatron-s3"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "megatron-s3 $*; $USER; $HOME"\n')
    program.chmod(0o755)

    def run(*words, **environment):
        path = f"{program.parent}:{os.environ['PATH']}"
        return subprocess.run(
            [ROOT / "docker" / "entrypoint.sh", *words],
            env={"PATH": path, "HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize("verb", VERBS)
def test_a_program_does_not_hide_a_verb_from_the_entry_point(entrypoint, tmp_path, verb):
    program = tmp_path / "bin" / verb
    program.write_text("#!/bin/sh\necho a program of the image\n")
    program.chmod(0o755)
    assert entrypoint(verb, "--help").stdout.startswith(f"megatron-s3 {verb} --help;")
    assert entrypoint(str(program), "--help").stdout == "a program of the image\n"


@pytest.mark.parametrize("words", ["launch tiny-s3 --dry-run", "--help", "export --out x", "lunch"])
def test_entry_point_gives_the_launcher_what_is_no_program(entrypoint, words):
    done = entrypoint(*words.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"megatron-s3 {words};")


def test_entry_point_runs_programs_and_hands_on_their_status(entrypoint):
    done = entrypoint("bash", "-c", 'echo "$1"; exit 7', "bash", "two words")
    assert (done.returncode, done.stdout) == (7, "two words\n")


def test_entry_point_makes_a_home_where_there_is_none(entrypoint, tmp_path):
    home = entrypoint("bash", "-c", 'touch "$HOME/x" && echo "$HOME"', HOME="/nowhere").stdout
    assert Path(home.strip(), "x").exists()
    assert home != "/nowhere\n"


def test_entry_point_names_the_places_that_cannot_be_written(entrypoint):
    done = entrypoint("launch", HOME="/nowhere", TMPDIR="/nor/here")
    assert done.returncode == 2
    assert "HOME (/nowhere) and /nor/here are not writable" in done.stderr
    assert done.stderr.count("\n") == 1


def test_entry_point_keeps_the_users_name_or_finds_one(entrypoint):
    assert "; somebody;" in entrypoint("plan", USER="somebody").stdout
    assert re.search(r"plan; \S+;", entrypoint("plan").stdout)
