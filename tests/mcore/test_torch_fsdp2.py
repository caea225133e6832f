"""--use-torch-fsdp2 in Megatron: parameters, main parameters and states that torch shards.

Of 0.19 alone: before, the trainer calls finish_grad_sync with what that wrapper does not take.
"""

from pathlib import Path

import pytest

from megatron_s3.telemetry.runlog import read
from tests.harness.trainer import assert_bitwise_equal, brief, tensors, train

pytestmark = pytest.mark.slow

SHARDED = ["--use-torch-fsdp2"]
COMMON = ["--untie-embeddings-and-output-weights", "--save-interval", "3"]
#: One microbatch a step: FSDP2 reduces each, DDP what they add up to.
AT_ONCE = ["--global-batch-size", "2"]
DCP = ["--ckpt-format", "torch_dcp"]

CASES = {
    "fp32": ["--optimizer", "s3"],
    "bf16": ["--optimizer", "s3", "--bf16"],
    "fp32, torch_dcp": ["--optimizer", "s3", *DCP],
    "bf16, torch_dcp": ["--optimizer", "s3", "--bf16", *DCP],
    "bf16, not fused": ["--optimizer", "s3", "--bf16", "--plugin-no-fused"],
    "clipped": ["--optimizer", "s3", "--bf16", "--clip-grad", "0.5"],
    "counts its steps": ["--optimizer", "s3", "--bf16", "--s3-beta-ramp"],
    "counts its steps, torch_dcp": ["--optimizer", "s3", "--s3-beta-ramp", *DCP],
    "adamw": ["--optimizer", "adamw"],
    "adan": ["--optimizer", "adan", "--bf16"],
    "lion": ["--optimizer", "lion"],
}


@pytest.mark.parametrize("name", brief(CASES, "counts its steps"))
def test_resumes_bitwise(name: str, tmp_path: Path) -> None:
    flags = [*CASES[name], *SHARDED, *COMMON]
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    one = train(*flags, "--save", through, ranks=2)
    (through / "latest_checkpointed_iteration.txt").write_text("3")
    two = train(*flags, "--load", through, "--save", resumed, ranks=2)
    assert one.losses_after(3) == two.losses_after(3)
    saved = tensors(through)
    assert any("exp_avg" in name for name in saved)
    assert_bitwise_equal(saved, tensors(resumed))


@pytest.mark.parametrize("precision", brief(["fp32", "bf16"], "fp32"))
def test_equals_data_parallel(precision: str, tmp_path: Path) -> None:
    """Bitwise, losses and statistics, where both add the gradients of two ranks and no more."""
    flags = ["--optimizer", "s3", "--untie-embeddings-and-output-weights", *AT_ONCE]
    flags += ["--plugin-log-updates", "--plugin-log-grad-norm"]
    if precision == "bf16":
        flags += ["--bf16"]
    plain = [*flags, *(["--grad-reduce-in-bf16"] if precision == "bf16" else [])]
    one = train(*plain, "--tensorboard-dir", tmp_path / "plain", ranks=2)
    two = train(*flags, *SHARDED, "--tensorboard-dir", tmp_path / "sharded", ranks=2)
    assert one.losses == two.losses
    records = [
        [record for record in read(tmp_path / name) if record["kind"] == "train"]
        for name in ("plain", "sharded")
    ]
    for a, b in zip(*records, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["updates"]["all"] == pytest.approx(b["updates"]["all"], rel=1e-9)


@pytest.mark.thorough
def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    train("--optimizer", "s3", *SHARDED, *COMMON, "--save", tmp_path, ranks=2)
    load = [*SHARDED, *COMMON, "--load", tmp_path]
    run = train("--optimizer", "adamw", *load, ranks=2, check=False)
    assert "was saved by --optimizer s3, whose state means nothing to --optimizer" in run.error
    assert not run.losses
