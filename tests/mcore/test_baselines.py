"""The other optimizers of the paper, through the same adapter and the real trainer."""

from pathlib import Path

import pytest

from megatron_s3.optimizers import OPTIMIZERS
from tests.harness.trainer import assert_bitwise_equal, brief, tensors, train

pytestmark = pytest.mark.slow

FLAGS = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
SHARDED = ["--bf16", *FLAGS]
#: A scale at which updates are not skipped.
FP16 = ["--fp16", "--initial-loss-scale", "1024"]
SAVE = ["--save-interval", "3"]


@pytest.mark.parametrize(
    "case",
    brief(
        [f"{name}-{kind}" for name in OPTIMIZERS if name != "s3" for kind in ("bf16", "fp16")],
        *("adan-bf16", "lion-fp16"),
    ),
)
def test_sharded_resumes_bitwise_and_loads_in_another_layout(case: str, tmp_path: Path) -> None:
    """Bitwise: with one state, two and four, and with schedules that count steps."""
    name, kind = case.split("-")
    flags = ["--optimizer", name, *(FP16 if kind == "fp16" else ["--bf16"]), *FLAGS]
    flags += ["--untie-embeddings-and-output-weights"]
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    train(*flags, *SAVE, "--save", through, ranks=2)
    saved = tensors(through)
    parts = {part for tensor in saved for part in tensor.split(".")}
    assert set(OPTIMIZERS[name].description.state) <= parts
    train(*flags, *SAVE, "--load", through, "--ckpt-step", 3, "--save", resumed, ranks=2)
    assert_bitwise_equal(saved, tensors(resumed))
    at_once = ["--ckpt-convert-format", "torch_dist", "--ckpt-convert-save", tmp_path]
    train(*flags, "--load", through, "--tensor-model-parallel-size", 2, *at_once, ranks=2)
    assert_bitwise_equal(saved, tensors(tmp_path / "torch_dist"))


def test_adamw_is_megatrons_adam(tmp_path: Path) -> None:
    """The losses of `--optimizer adam` (torch's AdamW here) to 6 digits, sharded, clipped.

    In fp32: the two round in another order, and what that does to a bf16 weight is no rounding.
    """
    adam = train("--optimizer", "adam", *FLAGS, "--adam-beta2", "0.95", ranks=2)
    adamw = train("--optimizer", "adamw", *FLAGS, ranks=2)
    assert adam.losses.keys() == adamw.losses.keys()
    for step, loss in adam.losses.items():
        assert float(adamw.losses[step]) == pytest.approx(float(loss), rel=2e-6)
