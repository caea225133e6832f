"""What the plugin does to a run with Megatron's own optimizer: nothing, but for one repair."""

from pathlib import Path

import pytest

from tests.harness.trainer import REPOSITORY, assert_bitwise_equal, brief, tensors, train

pytestmark = pytest.mark.slow

ADAM = ["--optimizer", "adam", "--bf16", "--use-distributed-optimizer"]
UNREGISTERED = (str(REPOSITORY / "tests/mcore/ranks/unregistered.py"),)


def test_changes_nothing() -> None:
    """Bitwise: the losses of AdamW with the plugin and without it; and nothing is said."""
    without = train(*ADAM, ranks=2, command=UNREGISTERED)
    registered = train(*ADAM, ranks=2)
    assert without.losses == registered.losses
    assert "clip_grad ....................................... 1.0" in registered.log
    assert not [line for line in registered.said if "training on the CPU" not in line]


FORMATS = {
    "dp_reshardable": [],
    "fully_reshardable": ["--dist-ckpt-optim-fully-reshardable"],
    "torch": ["--ckpt-format", "torch"],
}


@pytest.mark.parametrize("name", brief(FORMATS, "dp_reshardable"))
def test_adamw_resumes_without_transformer_engine(name: str, tmp_path: Path) -> None:
    """Bitwise, like S3; upstream alone stops at an assertion or a KeyError when it loads."""
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    flags = [*ADAM, *FORMATS[name], "--save-interval", "3"]
    one = train(*flags, "--save", through, ranks=2)
    (through / "latest_checkpointed_iteration.txt").write_text("3")
    load = ["--load", through]
    two = train(*flags, *load, "--save", resumed, ranks=2)
    assert two.losses[6] == one.losses[6]
    if name != "torch":
        assert_bitwise_equal(tensors(through), tensors(resumed))
    upstream = train(*flags, *load, ranks=2, command=UNREGISTERED, check=False)
    assert upstream.returncode != 0
