"""Checks that run as programs of their own, on real ranks, with Megatron imported."""

from pathlib import Path

import pytest

from tests.harness.trainer import REPOSITORY, forks, train

PROGRAMS = REPOSITORY / "tests/mcore/ranks"


@pytest.mark.parametrize(
    ("program", "ranks"), [("arguments", 1), ("adapter", 2), ("engine", 2), ("torch_fsdp2", 2)]
)
def test_program(program: str, ranks: int, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    status = forks().run([], ranks, log, program=PROGRAMS / f"{program}.py")
    assert status == 0 and f"{program}: ok" in log.read_text(), log.read_text()[-8000:]


def test_registration() -> None:
    """In a process in which nothing is registered yet."""
    run = train(command=(str(PROGRAMS / "seams.py"),), tiny=False)
    assert "seams: ok" in run.log
