"""The reproductions of upstream's faults, on upstream alone: their table says what is so now."""

import functools
import os
import re
from pathlib import Path

import pytest

from tests.harness.forks import Forks
from tests.harness.releases import INSTALLED, RELEASES, unpacked
from tests.harness.trainer import REPOSITORY

FOLDER = REPOSITORY / "patches/upstream/reports"
#: Where scripts/test.sh unpacks the package that has Lion.
EMERGING = REPOSITORY / ".venv/emerging-optimizers/0.3.0"

RANKS = {"lion_partly_reduced": 2}


@functools.cache
def process(release: str) -> Forks:
    """Returns a process with a release and without the plugin, whose forks are the ranks."""
    path = os.pathsep.join(map(str, (unpacked(release), EMERGING)))
    return Forks(path, imports="optimizers")


def table() -> dict[str, dict[str, str]]:
    """Returns what the page says of each fault in each release: yes, or no."""
    lines = (FOLDER.parent / "README.md").read_text().splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("| report |"))
    releases = [cell.strip() for cell in lines[head].split("|")[3:-1]]
    found = {}
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        (name,) = re.findall(r"\]\(reports/(\w+)\.md\)", cells[0])
        found[name] = dict(zip(releases, cells[2:], strict=True))
    return found


def test_each_report_has_its_reproduction_and_its_row() -> None:
    names = {path.stem for path in FOLDER.glob("*.md")}
    assert names == {path.stem for path in FOLDER.glob("*.py")} - {"small_model"}
    assert names == set(table())
    for name in names:
        assert f"{name}.py" in (FOLDER / f"{name}.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "release",
    [pytest.param(r, marks=[pytest.mark.thorough] * (r != INSTALLED)) for r in RELEASES],
)
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.md")))
def test_the_fault_is_there_or_mended_as_the_page_says(
    name: str, release: str, tmp_path: Path
) -> None:
    if name.startswith("lion") and not EMERGING.is_dir():
        pytest.skip(f"emerging-optimizers is not unpacked at {EMERGING}; scripts/test.sh does it")
    log = tmp_path / "log"
    status = process(release).run([], RANKS.get(name, 1), log, program=FOLDER / f"{name}.py")
    there = {"yes": 1, "no": 0}[table()[name][release]]
    lines = log.read_text().splitlines()
    said = [line for line in lines if line.startswith(("FAULT: ", "no fault"))]
    assert [line.startswith("FAULT: ") for line in said] == [bool(there)], log.read_text()
    assert status == there
