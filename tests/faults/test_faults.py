"""A little of each fault of ``python -m tests.faults``, with the real trainer."""

import json
import subprocess
import sys

import pytest

from tests.harness.trainer import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.thorough]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Rows of the table, by the function that made them."""
    out = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.faults", "--brief", "--out", out]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
    )
    assert (out / "faults.json").exists(), done.stdout[-4000:]
    record = json.loads((out / "faults.json").read_text())
    return {name: found["rows"] for name, found in record["faults"].items()}


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("kills", 3),
        ("overwrites", 1),
        ("flips", 60),
        ("damage", 4),
        ("gradients", 2),
        ("misfits", 3),
    ],
)
def test_nothing_is_lost_or_falsely_accepted(name: str, least: int, faults: dict) -> None:
    for row in faults[name]:
        assert row["survived"] == row["tried"] > 0, row
    assert sum(row["tried"] for row in faults[name]) >= least


def test_a_full_disk_is_named_and_costs_nothing(faults: dict) -> None:
    if not faults["full_disk"]:
        pytest.skip("nothing can be mounted here")
    for row in faults["full_disk"]:
        assert row["survived"] == row["tried"] > 0, row
