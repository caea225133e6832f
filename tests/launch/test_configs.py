"""Every shipped configuration, through the parser and the validation of every release."""

import os

import pytest

from megatron_s3.launch.configs import names
from tests.harness import fresh
from tests.harness.releases import INSTALLED, RELEASES, unpacked
from tests.harness.trainer import REPOSITORY, brief


@pytest.mark.slow
@pytest.mark.parametrize("release", brief(RELEASES, INSTALLED))
def test_every_configuration_is_accepted(release: str) -> None:
    run = fresh.run(
        *("-m", "megatron_s3.cli", "configs"),
        env=os.environ
        | {"PYTHONPATH": f"{unpacked(release)}{os.pathsep}{REPOSITORY}", "OMP_NUM_THREADS": "1"},
    )
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    assert f"megatron-core {release}: {len(names())} accepted, 0 rejected" in run.stdout
    rows = {line.split()[0]: line.split() for line in run.stdout.splitlines()}
    assert rows["gpt2-345m-paper-s3"][1] == "64,109,568"
    assert rows["quickstart/s3"][1:4] == ["by", "its", "dataset"]  # whose vocabulary it takes


# In a process of its own, which can be used for the CPU only afterwards.
UNCOUNTED = """
import sys
from megatron_s3.launch import configs
from megatron_s3.mcore.planning import job

def fails(args):
    raise ValueError("--fp8-format cannot be planned")

job.plan = fails
sys.exit(configs.main(sys.argv[1:]))
"""


def test_a_row_is_complete_whatever_the_end_is_given_in(tmp_path):
    """Samples are whole batches, and a model that no plan counts is accepted nevertheless."""
    endless, samples = tmp_path / "endless.yaml", tmp_path / "samples.yaml"
    head = "extends: models/tiny\narguments:\n  optimizer: s3\n  lr: 1e-3\n  train_iters: null\n"
    endless.write_text(head)
    samples.write_text(
        f"{head}  lr_warmup_iters: null\n  train_samples: 247\n"
        "array: {seed: [1, 2], s3_p: [2, 3]}\n"
    )
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(f"extends: {samples}\narray: {{s3_p: [2, 0.5]}}\n")
    run = fresh.run(
        *("-c", UNCOUNTED, endless, samples, wrong),
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 2, run.stderr
    assert "error: endless: no file sets train_iters or train_samples; add one" in run.stderr
    assert "error: --set s3_p=0.5: s3_p " in run.stderr
    assert "samples: --fp8-format cannot be planned" in run.stderr
    _, row, last = run.stdout.splitlines()
    assert row.startswith(f"{samples} (seed: 1, 2; s3_p: 2, 3)  not counted")
    assert row.split()[-3:] == ["30", "1.536e-05", "B"]
    assert last.endswith(": 1 accepted, 2 rejected")
