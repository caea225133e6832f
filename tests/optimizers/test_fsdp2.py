"""Models that torch shards, without Megatron: what FSDP2 needs of an optimizer."""

import os
import subprocess
import sys
from pathlib import Path

from tests.harness.trainer import REPOSITORY


def test_fsdp2_on_two_ranks(tmp_path: Path) -> None:
    """Bitwise the unsharded optimizer, given equal gradients; torch's checkpoints; refusals."""
    run = subprocess.run(
        [sys.executable, REPOSITORY / "tests/optimizers/ranks/fsdp2.py", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0 and "fsdp2: ok" in run.stdout, run.stdout[-4000:]
