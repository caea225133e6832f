"""The log of updates: every parameter of the model once, whatever the layout; what is written."""

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_s3.mcore.checkpoint.read import arguments
from megatron_s3.telemetry.runlog import read
from tests.harness.trainer import PARAMETERS, brief, train

pytestmark = pytest.mark.slow

S3 = ("--optimizer", "s3", "--plugin-log-updates")
LAYOUTS = {
    "data 2": (2, ()),
    "data 2, sharded": (2, ("--use-distributed-optimizer",)),
    "data 2, sharded, bf16": (2, ("--use-distributed-optimizer", "--bf16")),
    "tensor 2": (2, ("--tensor-model-parallel-size", "2")),
    "pipeline 2": (2, ("--pipeline-model-parallel-size", "2")),
    "data 2 x tensor 2, sharded": (
        4,
        ("--tensor-model-parallel-size", "2", "--use-distributed-optimizer"),
    ),
    "data 2 x pipeline 2, sharded": (
        4,
        ("--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"),
    ),
}
EXPERTS = ("--num-experts", "2", "--no-bias-gelu-fusion", "--disable-bias-linear")
EXPERT_LAYOUTS = {
    "experts 2": (2, ("--expert-model-parallel-size", "2")),
    "experts 2, sharded": (2, ("--expert-model-parallel-size", "2", "--use-distributed-optimizer")),
    "experts 2 x data 2, sharded": (
        4,
        ("--expert-model-parallel-size", "2", "--use-distributed-optimizer"),
    ),
}


def updates(folder: Path) -> dict[str, dict]:
    return next(r for r in read(folder) if r["kind"] == "train")["updates"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("alone")
    train(*S3, "--tensorboard-dir", folder)
    return updates(folder)


@pytest.mark.parametrize(
    "layout", brief(LAYOUTS, "data 2", "data 2, sharded, bf16", "tensor 2", "pipeline 2")
)
def test_every_parameter_is_counted_once(layout: str, alone, tmp_path) -> None:
    ranks, flags = LAYOUTS[layout]
    train(*S3, "--tensorboard-dir", tmp_path, *flags, ranks=ranks)
    found = updates(tmp_path)
    assert found["all"]["numel"] == PARAMETERS
    assert_counted_once(found, alone)
    assert found["all"]["zero_grads"] < PARAMETERS / 1000


@pytest.mark.parametrize("layout", brief(EXPERT_LAYOUTS, "experts 2, sharded"))
def test_every_expert_is_counted_once(layout: str, tmp_path) -> None:
    ranks, flags = EXPERT_LAYOUTS[layout]
    train(*S3, *EXPERTS, "--tensorboard-dir", tmp_path / "alone")
    train(*S3, *EXPERTS, "--tensorboard-dir", tmp_path, *flags, ranks=ranks)
    assert_counted_once(updates(tmp_path), updates(tmp_path / "alone"))


def assert_counted_once(found: dict[str, dict], alone: dict[str, dict]) -> None:
    """Numbers of parameters exact, of each kind and layer.

    The first update of S3 is (1 - beta**2)**(2/3) sign(g) whatever the gradient, and 0 where that
    is 0, so that its sums are known however ranks initialise: to fp32's rounding of u.
    """
    assert found["all"]["numel"] == alone["all"]["numel"]
    for group in ("kinds", "layers"):
        numbers = [{name: s["numel"] for name, s in u[group].items()} for u in (found, alone)]
        assert numbers[0] == numbers[1]
    first = (1 - 0.95**2) ** (2 / 3)
    for s in (found["all"], *found["kinds"].values(), *found["layers"].values()):
        assert s["max_abs"] == pytest.approx(first, rel=1e-6)
        touched = 1 - s["zero_grads"] / s["numel"]
        assert s["mean_abs"] == pytest.approx(first * touched, rel=1e-6)
        assert s["rms"] == pytest.approx(first * math.sqrt(touched), rel=1e-6)
        assert s["share_large"] == 0


def test_a_resumed_run_is_one_log(tmp_path) -> None:
    """Exact: losses and updates of a run that was resumed, in its log and TensorBoard's."""
    flags = (*S3, "--save-interval", "3", "--eval-interval", "3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*flags, "--tensorboard-dir", whole, "--save", tmp_path / "a")
    to = ("--tensorboard-dir", parts, "--save", tmp_path / "b", "--load", tmp_path / "b")
    train(*flags, *to, "--exit-interval", "4")  # one iteration beyond what it is resumed from
    (tmp_path / "b/latest_checkpointed_iteration.txt").write_text("3")
    with (parts / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "train", "iter')  # as a kill leaves it
    train(*flags, *to)
    records = [
        [(r["kind"], r["iteration"], r.get("loss"), r.get("updates")) for r in read(folder)]
        for folder in (whole, parts)
    ]
    resumed = [r for r in records[1] if r != ("start", 3, None, None)]
    assert resumed == records[0]
    spikes = [arguments(tmp_path / name / "iter_0000006").s3_spikes for name in "ab"]
    assert spikes[0] == spikes[1] and len(spikes[0]["detector"]["accepted"]) == 6
    assert [r[:2] for r in records[0]] == [
        ("start", 0), *(("train", i) for i in (1, 2, 3)), ("valid", 3),
        *(("train", i) for i in (4, 5, 6)), ("valid", 6), ("valid", 6), ("test", 6),
    ]  # fmt: skip


def test_a_launch_that_resumes_after_the_last_iteration_logs_its_evaluations(tmp_path) -> None:
    """It was killed after the last save; the evaluation of an earlier checkpoint is no launch."""
    flags = (*S3, "--save-interval", "3", "--tensorboard-dir", tmp_path, "--save", tmp_path)
    train(*flags)
    log = tmp_path / "metrics.jsonl"
    whole = log.read_text().splitlines(keepends=True)
    log.write_text("".join(whole[:-2]))  # those of the end
    train(*flags, "--load", tmp_path)
    kinds = [(r["kind"], r["iteration"]) for r in read(tmp_path)]
    assert kinds[-3:] == [("start", 6), ("valid", 6), ("test", 6)]
    assert kinds[:-3] == [("start", 0), *(("train", i) for i in range(1, 7))]
    kept = log.read_text()
    train(*flags, "--load", tmp_path, "--ckpt-step", "3", "--skip-train")
    assert log.read_text() == kept


def test_a_spike_after_a_resume(tmp_path) -> None:
    """The checkpoint holds what the detector knows: after a resume 32 losses would be too few.

    The spike is real: from there on a step takes nine tenths off every weight.
    """
    flags = (*S3, "--train-iters", "44", "--save", tmp_path, "--save-interval", "36")
    train(*flags, "--tensorboard-dir", tmp_path / "before", "--exit-interval", "36")
    decay = ("--override-opt-param-scheduler", "--weight-decay", "3e3")
    train(*flags, *decay, "--load", tmp_path, "--tensorboard-dir", tmp_path)
    records = read(tmp_path)
    first, *_ = (r for r in records if r["kind"] == "spike")
    assert first["onset"] == 38  # the first loss after such a step
    losses = {r["iteration"]: r["loss"] for r in records if r["kind"] == "train"}
    assert losses[38] > losses[37] + 0.5
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("spikes/count")] == [0.0] + [1.0] * 7
    assert {e.value for e in events.Scalars("update/bound")} == {1.0}


def test_skipped_updates_are_no_spike(tmp_path) -> None:
    """fp16 skips the first steps of a run, and where it tries a larger scale."""
    flags = (*S3, "--fp16", "--initial-loss-scale", "4294967296", "--hysteresis", "1")
    train(*flags, "--train-iters", "30", "--tensorboard-dir", tmp_path)
    records = [r for r in read(tmp_path) if r["kind"] == "train"]
    assert records[0]["skipped"] == 1 and records[0]["loss"] is None
    assert records[-1]["skipped"] == 0 and records[-1]["loss"] > 0


def test_other_optimizers_log_their_losses(tmp_path) -> None:
    run = train("--optimizer", "adam", "--plugin-metrics", "--tensorboard-dir", tmp_path)
    records = [r for r in read(tmp_path) if r["kind"] == "train"]
    assert len(records) == 6 and not any("updates" in r for r in records)
    assert f"{records[0]['loss']:.6E}" == run.losses[1]


@pytest.mark.parametrize("flag", ["--plugin-log-updates", "--plugin-metrics"])
def test_a_log_needs_a_folder(flag: str) -> None:
    run = train("--optimizer", "s3", flag, check=False)
    assert f"{flag} has no folder" in run.error and "--tensorboard-dir" in run.error
