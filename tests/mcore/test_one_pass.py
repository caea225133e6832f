"""The fused step between Megatron's buffers: the result of upstream's three passes, in one."""

from pathlib import Path

import pytest

from tests.harness.trainer import (
    PARAMETERS,
    REPOSITORY,
    assert_bitwise_equal,
    brief,
    tensors,
    train,
)

pytestmark = pytest.mark.slow

S3 = ["--optimizer", "s3"]
SHARDED = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
EXPERTS = ["--num-experts", "2", "--expert-model-parallel-size", "2", "--no-bias-gelu-fusion"]
FP16 = ["--fp16", "--initial-loss-scale", "65536"]

LAYOUTS = {
    "1 bf16": (1, ["--bf16"]),
    "dp2 bf16, gradients in bf16": (2, ["--bf16", "--grad-reduce-in-bf16"]),
    "dp2 bf16 sharded": (2, ["--bf16", *SHARDED]),
    "dp2 bf16 sharded, gradients in bf16": (2, ["--bf16", *SHARDED, "--grad-reduce-in-bf16"]),
    "dp2 bf16 sharded, gradients in bf16, clipped": (
        2,
        ["--bf16", *SHARDED, "--grad-reduce-in-bf16", "--clip-grad", "0.1"],
    ),
    "dp2 bf16 sharded, overlapped, in buckets": (
        2,
        [
            *["--bf16", *SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"],
            *["--ddp-bucket-size", "9000"],
        ],
    ),
    "dp2 fp32 sharded": (2, SHARDED),
    "dp2 fp16": (2, FP16),
    "dp2 fp16 sharded": (2, [*FP16, *SHARDED]),
    "pp2 bf16 sharded": (2, ["--bf16", *SHARDED, "--pipeline-model-parallel-size", "2"]),
    "ep2 bf16 sharded": (2, ["--bf16", *SHARDED, *EXPERTS]),
    "dp2 bf16 sharded, two learning rates": (
        2,
        ["--bf16", *SHARDED, "--decoupled-lr", "1e-3", "--untie-embeddings-and-output-weights"],
    ),
}


@pytest.mark.parametrize(
    "layout",
    brief(
        LAYOUTS,
        *("1 bf16", "dp2 bf16 sharded, gradients in bf16, clipped", "dp2 fp16 sharded"),
        *("dp2 bf16 sharded, overlapped, in buckets", "dp2 bf16 sharded, two learning rates"),
    ),
)
def test_same_bits_as_upstreams_phases(layout: str, tmp_path: Path) -> None:
    """Bitwise: every loss, and at the end model, main parameters and both states."""
    ranks, flags = LAYOUTS[layout]
    runs = {
        name: train(
            *S3, *flags, *more, "--save", tmp_path / name, "--save-interval", 6, ranks=ranks
        )
        for name, more in {"one": [], "phases": ["--plugin-no-fused"]}.items()
    }
    assert runs["one"].losses == runs["phases"].losses
    assert_bitwise_equal(tensors(tmp_path / "one"), tensors(tmp_path / "phases"))
    said = {name: " ".join(run.said) for name, run in runs.items()}
    assert "torch operations on cpu (--plugin-no-fused)" in said["phases"]
    assert "C++ kernel on cpu" in said["one"]
    assert "is updated by torch operations" not in said["one"] + said["phases"]


COPIES = {
    "whole": (["--bf16"], 0),
    "sharded": (["--bf16", *SHARDED], 0),
    "whole, bf16 gradients": (["--bf16", "--grad-reduce-in-bf16"], 0),
    "bf16 gradients": (["--bf16", *SHARDED, "--grad-reduce-in-bf16"], 0),
    "precision-aware": (["--bf16", *SHARDED, "--use-precision-aware-optimizer"], 0),
    "fp16": (FP16, 1),
    "clipped": (["--bf16", *SHARDED, "--grad-reduce-in-bf16", "--clip-grad", "1e6"], 1),
    "zeros": (["--bf16", *SHARDED, "--grad-reduce-in-bf16", "--log-num-zeros-in-grad"], 1),
    "norm": (["--bf16", *SHARDED, "--grad-reduce-in-bf16", "--plugin-log-grad-norm"], 1),
}


@pytest.mark.parametrize("case", brief(COPIES, "precision-aware"))
def test_copies_of_upstream(case: str) -> None:
    """Of gradients to fp32 ones and of main parameters to the model's: elements over elements.

    Gradients that something unscales, measures or counts are copied as upstream copies them.
    """
    flags, copies = COPIES[case]
    program = (str(REPOSITORY / "tests/mcore/ranks/copies.py"),)
    run = train(*S3, *flags, ranks=2, command=program)
    (counted,) = [line for line in run.log.splitlines() if line.startswith("copied in a step")]
    copied = int(counted.split()[-1])
    shards = 2 if "--use-distributed-optimizer" in flags else 1
    assert copied == copies * PARAMETERS // shards


@pytest.mark.thorough
def test_upstreams_phases_are_taken_without_the_kernel() -> None:
    """And the counting sees them; a path of torch operations converts chunks beside."""
    program = (str(REPOSITORY / "tests/mcore/ranks/copies.py"),)
    counts = {}
    for grads in ([], ["--grad-reduce-in-bf16"]):
        run = train(*S3, "--bf16", *SHARDED, *grads, "--plugin-no-fused", ranks=2, command=program)
        (counted,) = [line for line in run.log.splitlines() if line.startswith("copied in a step")]
        counts[bool(grads)] = int(counted.split()[-1])
    assert counts[False] >= PARAMETERS // 2
    assert counts[True] == counts[False] + PARAMETERS // 2


def test_where_the_kernel_cannot_run_it_is_said_once(tmp_path: Path) -> None:
    """p = 2.5 has no C++ kernel."""
    run = train(*S3, "--bf16", "--s3-p", "2.5", ranks=2)
    (line,) = [line for line in run.said if "torch operations" in line]
    assert line == (
        "step: torch operations on cpu (the C++ kernel has p = 1, 2 and 3, not 2.5); "
        "no gradient clipping"
    )
    assert not [line for line in run.said if "C++ kernel on" in line]
