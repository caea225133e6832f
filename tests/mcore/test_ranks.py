"""Checks that run as programs of their own, on real ranks, with Megatron imported."""

import pytest

from tests.trainer import REPOSITORY, train


@pytest.mark.parametrize(
    ("program", "ranks"),
    [("arguments", 1), ("seams", 1), ("adapter", 2), ("engine", 2), ("torch_fsdp2", 2)],
)
def test_program(program: str, ranks: int) -> None:
    path = REPOSITORY / "tests/mcore/ranks" / f"{program}.py"
    run = train(ranks=ranks, command=(str(path),), tiny=False)
    assert f"{program}: ok" in run.log
