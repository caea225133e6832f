"""`patches/megatron-lm.patch` against the wheels: applied, trained through, reversed."""

import filecmp
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness.releases import INSTALLED, RELEASES, unpacked
from tests.harness.trainer import (
    ITERATIONS,
    REPOSITORY,
    assert_bitwise_equal,
    brief,
    tensors,
    train,
)

PATCH = REPOSITORY / "patches/megatron-lm.patch"


def git_apply(tree: Path, *flags: str) -> None:
    subprocess.run(["git", "apply", *flags, str(PATCH)], cwd=tree, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("release", brief(RELEASES, INSTALLED))
def test_wheel_with_the_patch_alone(release: str, tmp_path: Path) -> None:
    """The patched wheel trains with S3 from a script that never mentions the plugin."""
    original = unpacked(release) / "megatron/training"
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(unpacked(release) / "megatron", tree / "megatron", ignore=ignore)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)  # not this repository's

    git_apply(tree)
    run = train(
        *["--optimizer", "s3", "--bf16", "--use-distributed-optimizer"],
        *["--plugin-device", "cpu"],  # which the patch's register() does not choose itself
        ranks=2,
        megatron=tree,
        command=(str(REPOSITORY / "tests/mcore/ranks/plain_script.py"),),
    )
    assert ITERATIONS in run.losses
    assert any("sharded over 2" in line for line in run.said)

    git_apply(tree, "-R")
    assert filecmp.cmp(tree / "megatron/training/__init__.py", original / "__init__.py", False)


@pytest.mark.slow
@pytest.mark.parametrize("release", brief(RELEASES[:-1], RELEASES[0]))
def test_older_wheels_resume(release: str, tmp_path: Path) -> None:
    """Bitwise resume through the releases whose checkpoint code names Adam's states itself.

    And which cannot tell param groups apart that differ in their rates alone.
    """
    flags = ["--optimizer", "s3", "--bf16", "--use-distributed-optimizer", "--save-interval", 3]
    flags += ["--dist-ckpt-optim-fully-reshardable", "--decoupled-lr", "1e-3"]
    flags += ["--untie-embeddings-and-output-weights"]
    through, resumed, tree = tmp_path / "through", tmp_path / "resumed", unpacked(release)
    train(*flags, "--save", through, ranks=2, megatron=tree)
    load = ["--load", through, "--ckpt-step", 3]
    train(*flags, *load, "--save", resumed, ranks=2, megatron=tree)
    saved = tensors(through)
    assert any(name.startswith("optimizer.state.exp_pnorm.") for name in saved)
    assert not any("exp_avg_sq" in name for name in saved)
    assert_bitwise_equal(saved, tensors(resumed))
