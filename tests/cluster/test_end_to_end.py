"""Text to figures by way of a SLURM job that loses a rank: one script, one command a step."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.cluster


def test_from_text_to_figures(tmp_path: Path) -> None:
    run = subprocess.run(
        [HERE / "with_cluster.sh", "2", tmp_path / "cluster", HERE / "end_to_end.sh", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"MEGATRON_S3_PYTHON": sys.executable},
    )
    print(run.stdout)
    assert run.returncode == 0
    assert "a rank is killed" in run.stdout
    assert re.search(r"failed with status \d+, checkpoint 0 -> 10; requeued, 1 of", run.stdout)
    assert "resuming from iteration 10" in run.stdout
    assert "the job has ended at checkpoint 30" in run.stdout
    assert re.search(r"largest difference from Megatron's logits", run.stdout)
    assert re.search(r"\| S3 +\| ", run.stdout)
