"""Megatron-Bridge's own ``pretrain()`` with S3, on two CPU ranks.

What stands in for what is not here is listed in :mod:`tests.bridge.program`.
"""

import functools
import re
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_s3.checkpoints import convert
from megatron_s3.storage import index
from megatron_s3.telemetry import runlog
from tests.bridge.ranks import process
from tests.harness.runs import Run
from tests.harness.tensors import assert_bitwise_equal, tensors
from tests.harness.trainer import brief

pytestmark = pytest.mark.slow

#: Parameters in several buckets, each of which ends in padding.
BUCKETS = "ddp.bucket_size=5000"
FORMATS = {
    "dp_reshardable": [BUCKETS],
    "fully_reshardable": [BUCKETS, "checkpoint.dist_ckpt_optim_fully_reshardable=true"],
}

UNSHARDED = [
    f"{part}.{each}"
    for part in ("ddp", "optimizer")
    for each in ("use_distributed_optimizer=false", "overlap_param_gather=false")
]


def trained(folder: Path, how: str, *overrides: str, ranks: int = 2) -> Run:
    """Trains, and saves iterations 3 and 6 in the folder."""
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    status = process().run([how, folder, *overrides], ranks, log)
    return Run(status, log.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder of a training by its arguments, each trained once."""
    folder = tmp_path_factory.mktemp("bridge")

    @functools.cache
    def train(how: str, *overrides: str) -> Path:
        path = folder / f"{how}-{len(list(folder.iterdir()))}"
        run = trained(path, how, *overrides)
        assert run.returncode == 0, run.log[-6000:]
        assert f"wrapped: {how == 'registered'}" in run.log
        return path

    return train


@pytest.mark.parametrize("name", brief(FORMATS, "dp_reshardable"))
def test_it_trains_saves_and_resumes_bitwise(name, finished, tmp_path):
    """Without a wrapper; with the plugin registered the bits are the same."""
    overrides = FORMATS[name]
    whole = finished("s3", *overrides)
    losses = Run(0, whole.with_suffix(".log").read_text()).column("lm loss")
    assert len(losses) == 6 and float(losses[6]) < float(losses[1]) - 0.05
    halves = [f"checkpoint.load={whole}", "checkpoint.ckpt_step=3"]
    run = trained(tmp_path / "resumed", "s3", *overrides, *halves)
    assert run.returncode == 0, run.log[-6000:]
    assert run.column("lm loss") == {i: loss for i, loss in losses.items() if i > 3}
    assert_bitwise_equal(tensors(tmp_path / "resumed"), tensors(whole))
    registered = finished("registered", *overrides)
    assert_bitwise_equal(tensors(registered), tensors(whole))
    assert any(each.endswith("exp_pnorm") or ".exp_pnorm." in each for each in tensors(whole))


#: Some parameters have another optimizer, others another rate, coefficient or order.
RULES = (
    "*word_embeddings*: optimizer=adamw lr=0.0003 beta2=0.99",
    "*linear_proj*: optimizer=lion weight_decay=0.2",
    "*linear_fc1.weight: beta=0.8 p=2",
)


@pytest.mark.parametrize("name", brief(FORMATS, "dp_reshardable"))
def test_several_optimizers_in_one_model_resume_bitwise(name, finished, tmp_path):
    """Without a wrapper; with the plugin registered the bits are the same."""
    overrides = [*FORMATS[name], f"optimizer.plugin_overrides={list(RULES)}"]
    whole = finished("s3", *overrides)
    log = Run(0, whole.with_suffix(".log").read_text())
    head = next(i for i, line in enumerate(log.said) if line.startswith("pattern"))
    rows = [line.split() for line in log.said[head + 1 : head + 5]]
    assert [(row[0], row[-3], row[-2]) for row in rows] == [
        ("*word_embeddings*", "AdamW", "0.0003"),
        ("*linear_proj*", "Lion", "0.003"),
        ("*linear_fc1.weight", "(SoftSignSGD)", "0.003"),
        ("all", "(SoftSignSGD)", "0.003"),
    ]
    halves = [f"checkpoint.load={whole}", "checkpoint.ckpt_step=3"]
    run = trained(tmp_path / "resumed", "s3", *overrides, *halves)
    assert run.returncode == 0, run.log[-6000:]
    losses = log.column("lm loss")
    assert run.column("lm loss") == {i: loss for i, loss in losses.items() if i > 3} != {}
    assert_bitwise_equal(tensors(tmp_path / "resumed"), tensors(whole))
    assert_bitwise_equal(tensors(finished("registered", *overrides)), tensors(whole))
    assert any("exp_pnorm_or_exp_avg_sq" in each for each in tensors(whole))
    run = trained(tmp_path / "plain", "registered", *FORMATS[name], *halves)
    assert run.returncode != 0 and not run.trained
    assert "and adamw for '*word_embeddings*', and this run has s3" in run.error


def test_the_command_line_sets_hyperparameters_that_are_recorded(finished, tmp_path):
    changed = finished("s3", BUCKETS, "optimizer.s3_p=2.0", "optimizer.s3_beta=0.9")
    config = yaml.safe_load((changed / "iter_0000006/run_config.yaml").read_text())["optimizer"]
    assert config["_target_"].endswith(".S3OptimizerConfig")
    assert (config["s3_p"], config["s3_beta"], config["s3_nesterov"]) == (2.0, 0.9, True)
    assert (config["clip_grad"], config["lr"], config["optimizer"]) == (0.0, 3e-3, "s3")
    log = changed.with_suffix(".log").read_text()
    assert "S3 (SoftSignSGD) with beta=0.9 p=2.0" in log
    plain = finished("s3", *FORMATS["dp_reshardable"])
    assert Run(0, log).losses != Run(0, plain.with_suffix(".log").read_text()).losses
    for override, said in (
        ("optimizer.s3_bta=0.9", "Could not override 'optimizer.s3_bta'"),
        ("optimizer.s3_p=0.5", "s3_p must be in"),
        ("optimizer.optimizer=adam", "it builds 's3' alone"),
    ):
        run = trained(tmp_path / "refused", "s3", override)
        assert run.returncode != 0 and said in run.log and not run.trained


def test_the_weight_decay_of_the_recipe_is_in_force(finished):
    """Bridge's scheduler overwrites the optimizer's."""
    log = finished("s3", *FORMATS["dp_reshardable"]).with_suffix(".log").read_text()
    assert "scheduler.end_weight_decay 0.033 -> 0.0033" in log
    assert "optimizer.lr 0.0003 -> 0.003" in log and "optimizer.clip_grad 1.0 -> 0.0" in log


@pytest.mark.parametrize(
    ("how", "layout"),
    [
        ("s3", FORMATS["dp_reshardable"]),
        ("registered", FORMATS["dp_reshardable"]),
        ("s3", UNSHARDED),
    ],
)
def test_a_resumed_run_uses_the_rates_that_the_schedule_names(how, layout, finished, tmp_path):
    """Those of the checkpoint, with the losses of a run that did not stop; or its own."""
    whole = finished(how, *layout)
    losses = Run(0, whole.with_suffix(".log").read_text()).column("lm loss")
    more = [f"checkpoint.load={whole}", "checkpoint.ckpt_step=3", "optimizer.lr=0.001"]
    more += ["optimizer.min_lr=0.0001"]
    more += ["scheduler.start_weight_decay=0.5", "scheduler.end_weight_decay=0.5"]
    found = {}
    for checkpoints, own in ("true", "false"), ("false", "true"):
        run = trained(
            tmp_path / checkpoints,
            how,
            *layout,
            *more,
            f"scheduler.use_checkpoint_opt_param_scheduler={checkpoints}",
            f"scheduler.override_opt_param_scheduler={own}",
        )
        assert run.returncode == 0, run.log[-6000:]
        found[checkpoints] = run.column("lm loss")
    assert found["true"] == {i: loss for i, loss in losses.items() if i > 3}
    assert_bitwise_equal(tensors(tmp_path / "true"), tensors(whole))
    assert found["false"] != found["true"]
    assert "max_lr=0.003 min_lr=0.0003; the run continues with max_lr=0.001" in run.log


@pytest.mark.thorough
def test_without_the_distributed_optimizer_the_losses_are_the_same(finished):
    whole = finished("s3", *UNSHARDED)
    sharded = finished("s3", *FORMATS["dp_reshardable"])
    runs = [Run(0, each.with_suffix(".log").read_text()) for each in (whole, sharded)]
    assert runs[0].column("lm loss") == runs[1].column("lm loss")
    assert "not sharded" in runs[0].built and "sharded over 2" in runs[1].built


@pytest.mark.thorough
def test_other_dtypes_of_states_need_no_transformer_engine(finished):
    folder = finished(
        "s3",
        "optimizer.use_precision_aware_optimizer=true",
        "optimizer.exp_avg_dtype=torch.bfloat16",
        "optimizer.exp_avg_sq_dtype=torch.bfloat16",
    )
    assert "exp_avg bfloat16, exp_pnorm bfloat16" in folder.with_suffix(".log").read_text()


def test_a_damaged_checkpoint_and_one_of_adam_are_refused_where_it_is_registered(
    finished, tmp_path
):
    whole = finished("registered", *FORMATS["dp_reshardable"])
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    entries = index.read(damaged / "iter_0000006").storage_data.values()
    largest = max(entries, key=lambda entry: entry.length)  # its middle is in a tensor's data
    data = damaged / "iter_0000006" / largest.relative_path
    content = bytearray(data.read_bytes())
    content[largest.offset + largest.length // 2] ^= 1
    data.write_bytes(content)
    more = ["train.train_iters=8", BUCKETS]
    for name, load, said in (
        ("one", damaged, f"{data.name} is damaged"),
        ("other", finished("adam", BUCKETS), "was saved by one of Megatron's own optimizers"),
    ):
        run = trained(tmp_path / name, "registered", f"checkpoint.load={load}", *more)
        assert run.returncode != 0 and said in run.error
        assert not run.trained and not (tmp_path / name).exists()


def test_the_callback_logs_losses_updates_and_rates(finished):
    whole = finished("s3", *FORMATS["dp_reshardable"])
    printed = Run(0, whole.with_suffix(".log").read_text()).column("lm loss")
    start, *records = runlog.read(whole)
    assert (start["optimizer"], start["hyperparameters"]["p"]) == ("s3", 3.0)
    assert start["flops"] > 0 and start["train_iters"] == 6 and start["bound"] == 1.0
    assert [record["kind"] for record in records] == ["train"] * 6
    assert [record["iteration"] for record in records] == list(range(1, 7))
    assert [record["tokens"] for record in records] == [8 * 32 * i for i in range(1, 7)]
    for record in records:
        assert record["loss"] == pytest.approx(float(printed[record["iteration"]]), rel=1e-5)
        assert 0 < record["updates"]["all"]["mean_abs"] <= record["updates"]["all"]["max_abs"] <= 1
        assert record["grad_norm"] > 0 and len(record["updates"]["layers"]) == 2
    numel = records[0]["updates"]["all"]["numel"]
    weights = {n: t for n, t in tensors(whole).items() if not n.startswith("optimizer")}
    assert numel == sum(tensor.numel() for tensor in weights.values())
    assert max(record["lr"] for record in records) == pytest.approx(3e-3)


@pytest.mark.thorough
def test_a_resumed_log_goes_on_where_the_checkpoint_is(finished, tmp_path):
    """The lines of the first launch stay, and the detector of spikes has seen their losses."""
    whole = finished("s3", *FORMATS["dp_reshardable"])
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (resumed / runlog.NAME).write_bytes((whole / runlog.NAME).read_bytes())
    load = [f"checkpoint.load={whole}", "checkpoint.ckpt_step=3"]
    run = trained(resumed, "s3", *FORMATS["dp_reshardable"], *load)
    assert run.returncode == 0, run.log[-6000:]
    lines = [r for r in runlog.read(resumed) if r["kind"] == "train"]
    assert [record["iteration"] for record in lines] == list(range(1, 7))
    first = [r for r in runlog.read(whole) if r["kind"] == "train"]
    for one, other in zip(lines, first, strict=True):
        assert one["loss"] == other["loss"] and one["updates"] == other["updates"]


def test_the_callback_logs_validation_and_test_losses(finished):
    folder = finished("s3", "validation.eval_iters=1", "validation.eval_interval=3")
    lines = [r for r in runlog.read(folder) if r["kind"] in ("valid", "test")]
    # Bridge evaluates during training, and after it on both sets.
    assert [(r["kind"], r["iteration"]) for r in lines] == [
        ("valid", 3),
        ("valid", 6),
        ("valid", 6),
        ("test", 6),
    ]
    log = folder.with_suffix(".log").read_text()
    printed = re.findall(r"lm loss value: (\S+)", log)
    assert printed == [f"{r['loss']:.6E}" for r in lines]


@pytest.mark.thorough
def test_with_adam_it_logs_all_but_updates(finished):
    adams = finished("adam", BUCKETS)
    start, *records = runlog.read(adams)
    assert start["optimizer"] == "adam" and len(records) == 6
    assert all("updates" not in record and record["loss"] > 0 for record in records)


def test_s3_goes_on_from_adams_converted_checkpoint(finished, tmp_path):
    adams, converted = finished("adam", BUCKETS), tmp_path / "converted"
    record = convert.convert(adams, converted, "s3", lr_factor=10.0)
    assert record["iteration"] == 6
    load = [f"checkpoint.load={converted}", "train.train_iters=8", "scheduler.lr_decay_iters=8"]
    run = trained(tmp_path / "on", "registered", BUCKETS, *load)
    assert run.returncode == 0, run.log[-6000:]
    assert list(run.column("lm loss")) == [7, 8]
    assert "checksums verified" in run.log
