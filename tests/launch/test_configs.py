"""Every shipped configuration, through the parser and the validation of every release."""

import os
import subprocess
import sys

import pytest

from megatron_s3.launch.configs import names
from tests.harness.releases import INSTALLED, RELEASES, unpacked
from tests.harness.trainer import REPOSITORY, brief


@pytest.mark.slow
@pytest.mark.parametrize("release", brief(RELEASES, INSTALLED))
def test_every_configuration_is_accepted(release: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "megatron_s3.cli", "configs"],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": f"{unpacked(release)}{os.pathsep}{REPOSITORY}", "OMP_NUM_THREADS": "1"},
    )
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    assert f"megatron-core {release}: {len(names())} accepted, 0 rejected" in run.stdout
    rows = {line.split()[0]: line.split() for line in run.stdout.splitlines()}
    assert rows["gpt2-345m-paper-s3"][1] == "64,109,568"
    assert rows["quickstart/s3"][1:4] == ["by", "its", "dataset"]  # whose vocabulary it takes
