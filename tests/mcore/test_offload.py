"""--optimizer-cpu-offload: the bits and the checkpoints of the same run without it.

The GPU is the CPU here: what is exercised is who holds and steps what, not page-locked memory,
streams or transfers.
"""

from pathlib import Path

import pytest

from megatron_s3.telemetry.runlog import read
from tests.harness.releases import RELEASES, unpacked
from tests.harness.trainer import PARAMETERS, assert_bitwise_equal, brief, tensors, train

pytestmark = pytest.mark.slow

AWARE = ["--use-distributed-optimizer", "--use-precision-aware-optimizer", "--save-interval", "3"]
BF16, TORCH = ["--bf16"], ["--ckpt-format", "torch"]
RESHARDABLE = ["--dist-ckpt-optim-fully-reshardable"]
FP32_MAINS = ["--plugin-no-param-remainders"]
HALF, OVERLAP = ["--optimizer-offload-fraction", "0.5"], ["--overlap-cpu-optimizer-d2h-h2d"]

CASES = {
    # name: what both runs have, what the offloaded one has.
    "bf16, half, overlapped": (["--optimizer", "s3", *BF16], [*HALF, *OVERLAP]),
    "bf16, all, reshardable": (["--optimizer", "s3", *BF16, *RESHARDABLE], []),
    "bf16, half, torch": (["--optimizer", "s3", *BF16, *TORCH], HALF),
    "bf16, states and gradients in bf16": (
        [
            *["--optimizer", "s3", *BF16, "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"],
            *["--main-grads-dtype", "bf16"],
        ],
        [*HALF, "--no-pin-cpu-grads", "--no-pin-cpu-params"],
    ),
    "bf16, parameters gathered in parallel": (
        ["--optimizer", "s3", *BF16, "--overlap-grad-reduce", "--overlap-param-gather"],
        OVERLAP,
    ),
    "fp32, half, overlapped": (["--optimizer", "s3", *RESHARDABLE], [*HALF, *OVERLAP]),
    "fp32, all": (["--optimizer", "s3"], []),
    "fp16": (
        [
            *["--optimizer", "s3", "--fp16", "--initial-loss-scale", "65536"],
            "--accumulate-allreduce-grads-in-fp32",
        ],
        HALF,
    ),
    "not fused": (["--optimizer", "s3", *BF16, "--plugin-no-fused"], HALF),
    "clipped": (["--optimizer", "s3", *BF16, "--clip-grad", "0.5"], HALF),
    "ramp": (["--optimizer", "s3", *BF16, "--s3-beta-ramp"], HALF),
    "adan": (["--optimizer", "adan", *BF16], HALF),
    "adamw": (["--optimizer", "adamw", *BF16], [*HALF, *OVERLAP]),
    "lion": (["--optimizer", "lion", *RESHARDABLE], HALF),
}


def logged_steps(folder: Path) -> list[dict]:
    return [record for record in read(folder) if record["kind"] == "train"]


@pytest.mark.parametrize("name", brief(CASES, "bf16, half, overlapped"))
def test_the_same_bits_and_checkpoints(name: str, tmp_path: Path) -> None:
    """Bitwise, losses and every tensor; saved with and resumed without it, and the reverse."""
    common, own = CASES[name]
    logged = ["--plugin-log-updates", "--plugin-log-grad-norm", "--tensorboard-dir"]
    without, offloaded, entered, left = (tmp_path / n for n in ("a", "b", "c", "d"))
    flags = [*AWARE, *common]
    offload = [*flags, "--optimizer-cpu-offload", *own]
    flags += FP32_MAINS if "--bf16" in common else []  # the CPU keeps no remainders
    one = train(*flags, *logged, without, "--save", without, ranks=2)
    two = train(*offload, *logged, offloaded, "--save", offloaded, ranks=2)
    (line,) = [line for line in two.said if "the CPU keeps and updates" in line]
    assert f"{PARAMETERS:,}" not in line, "sharded"
    assert one.losses == two.losses
    for a, b in zip(logged_steps(without), logged_steps(offloaded), strict=True):
        assert a["grad_norm"] == b["grad_norm"] and a["updates"].keys() == b["updates"].keys()
        assert a["updates"]["all"] == pytest.approx(b["updates"]["all"], rel=1e-9)
    if TORCH[1] in common:
        for directory in (without, offloaded):
            (directory / "latest_checkpointed_iteration.txt").write_text("3")
    load = [] if TORCH[1] in common else ["--ckpt-step", 3]
    into = train(*offload, "--load", without, *load, "--save", entered, ranks=2)
    out = train(*flags, "--load", offloaded, *load, "--save", left, ranks=2)
    assert one.losses[6] == into.losses[6] == out.losses[6]
    if TORCH[1] not in common:
        saved = tensors(without)
        for directory in (offloaded, entered, left):
            assert_bitwise_equal(saved, tensors(directory))


@pytest.mark.thorough
def test_weights_alone_reach_the_main_parameters(tmp_path: Path) -> None:
    """--finetune, in bf16 and in fp32, where main parameters lie in both memories."""
    for precision in (BF16, []):
        flags = [*AWARE, "--optimizer", "s3", *precision]
        train(*flags, "--save", tmp_path, ranks=2)
        load = ["--load", tmp_path, "--finetune", "--seed", "4321"]
        plain = train(*flags, *load, *(FP32_MAINS if precision else []), ranks=2)
        offloaded = train(*flags, *load, "--optimizer-cpu-offload", *HALF, ranks=2)
        assert plain.losses == offloaded.losses


@pytest.mark.thorough
@pytest.mark.parametrize("release", RELEASES[:-1])
def test_older_releases(release: str, tmp_path: Path) -> None:
    tree = unpacked(release)
    flags = [*AWARE, "--optimizer", "s3", *BF16, "--optimizer-cpu-offload", *HALF]
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    train(*flags, "--save", through, ranks=2, megatron=tree)
    load = ["--load", through, "--ckpt-step", 3]
    train(*flags, *load, "--save", resumed, ranks=2, megatron=tree)
    assert_bitwise_equal(tensors(through), tensors(resumed))


@pytest.mark.thorough
def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    flags = [*AWARE, *BF16, "--optimizer-cpu-offload"]
    train(*flags, "--optimizer", "s3", "--save", tmp_path, ranks=2)
    run = train(*flags, "--optimizer", "adamw", "--load", tmp_path, ranks=2, check=False)
    assert "was saved by --optimizer s3, whose state means nothing to --optimizer" in run.error
    assert not run.losses
