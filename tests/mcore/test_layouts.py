"""`--optimizer s3` in the real trainer, in every layout the plugin supports."""

import functools

import pytest

from tests.harness.trainer import ITERATIONS, PARAMETERS, Run, train

pytestmark = pytest.mark.slow

DISTRIBUTED = "--use-distributed-optimizer"
EXPERTS = ["--num-experts", "2", "--expert-model-parallel-size", "2"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]

LAYOUTS = {
    "1 fp32": (1, []),
    "1 bf16": (1, ["--bf16"]),
    "dp2 bf16": (2, ["--bf16"]),
    "dp2 bf16 sharded": (2, ["--bf16", DISTRIBUTED]),
    "dp2 bf16 sharded overlapped": (2, ["--bf16", DISTRIBUTED, *OVERLAP]),
    "dp2 fp32 sharded": (2, [DISTRIBUTED]),
    "dp2 fp16": (2, ["--fp16", "--initial-loss-scale", "65536"]),
    "dp2 fp16 sharded": (2, ["--fp16", DISTRIBUTED, "--initial-loss-scale", "65536"]),
    "tp2 bf16 sharded": (2, ["--bf16", "--tensor-model-parallel-size", "2", DISTRIBUTED]),
    "pp2 bf16 sharded": (2, ["--bf16", "--pipeline-model-parallel-size", "2", DISTRIBUTED]),
    "dp2tp2 bf16 sharded": (4, ["--bf16", "--tensor-model-parallel-size", "2", DISTRIBUTED]),
    "dp2pp2 bf16 sharded": (4, ["--bf16", "--pipeline-model-parallel-size", "2", DISTRIBUTED]),
    "ep2 bf16 sharded": (
        2,
        ["--bf16", "--no-bias-gelu-fusion", *EXPERTS, DISTRIBUTED],
    ),
}


@functools.cache
def run(layout: str) -> Run:
    ranks, flags = LAYOUTS[layout]
    return train("--optimizer", "s3", *flags, ranks=ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains(layout: str) -> None:
    """Every iteration is taken, the loss falls, and the log says what was built."""
    result = run(layout)
    losses = {i: float(loss) for i, loss in result.losses.items()}
    assert ITERATIONS in losses
    assert losses[ITERATIONS] < losses[1]
    assert "number of skipped iterations:   1" not in result.log
    built = result.built
    assert ("sharded over" in built) == ("sharded" in layout)
    assert "no gradient clipping" in built
    assert "grad norm:" not in result.log
    if layout.startswith(("1 ", "dp2 ")):
        shards = 2 if "sharded" in layout else 1
        assert f"{PARAMETERS // shards:,} parameters of rank 0" in built


@pytest.mark.parametrize("other", ["dp2 bf16 sharded", "dp2 bf16 sharded overlapped"])
def test_sharding_changes_no_loss(other: str) -> None:
    """Bitwise: the update of an element depends on it alone, and two ranks sum without order."""
    assert run("dp2 bf16").losses == run(other).losses


def test_fp16_sharding_changes_no_loss() -> None:
    """Bitwise, as for bf16."""
    assert run("dp2 fp16").losses == run("dp2 fp16 sharded").losses


@pytest.mark.parametrize("sharded", [(), (DISTRIBUTED,)], ids=["whole", "sharded"])
def test_overflow_skips_the_step(sharded: tuple[str, ...]) -> None:
    """A loss scale that must overflow skips steps, until it has been halved often enough."""
    result = train(
        *["--optimizer", "s3", "--fp16", "--initial-loss-scale", "4294967296", "--hysteresis", "1"],
        *sharded,
        ranks=2,
    )
    assert "number of skipped iterations:   1" in result.log
    # Without an update the first two losses of the same data would be those of the first model.
    assert "number of nan iterations:   1" not in result.log


def test_gradient_accumulation_and_recorded_updates(tmp_path) -> None:
    """|update| is at most 1; the first step of a run is (1 - beta**2)**(1 - 1/p) where g != 0."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        *["--optimizer", "s3", "--bf16", DISTRIBUTED, "--plugin-log-updates"],
        *["--micro-batch-size", "1", "--global-batch-size", "8", "--tensorboard-dir", tmp_path],
        ranks=2,
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    largest = [event.value for event in events.Scalars("update/max_abs")]
    assert len(largest) == ITERATIONS
    assert largest[0] == pytest.approx((1 - 0.95**2) ** (2 / 3), rel=1e-6)
    assert all(0 < value <= 1 for value in largest)
