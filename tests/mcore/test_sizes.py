"""What real ranks allocate is what the plan says."""

import pytest

from tests.harness.trainer import REPOSITORY, train


@pytest.mark.slow
def test_real_ranks_allocate_what_is_planned():
    """Worlds of 4, 2 and 1 ranks; see the program for the 23 layouts, 19 with S3 and AdamW each."""
    run = train(ranks=4, command=(str(REPOSITORY / "tests/mcore/ranks/sizes.py"),), tiny=False)
    assert "sizes: ok, 42" in run.log
