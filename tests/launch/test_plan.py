"""Plans: the arithmetic on made-up ranks, refusals, and GPT-2 7B on 64 and 10,240 GPUs."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_s3 import data
from megatron_s3.launch.config import ConfigError, load
from megatron_s3.launch.plan import main
from megatron_s3.launch.plan_text import as_json, text
from megatron_s3.launch.planning import Plan, _signal, _vocabulary
from megatron_s3.mcore.planning import memory
from megatron_s3.mcore.planning.memory import Buffer, Rank, Sizes

REPOSITORY = Path(__file__).parents[2]

ARGS = {"global_batch_size": 8, "train_iters": 30}

# 1000 parameters in bf16 with fp32 gradients, 24 elements of padding, 8 ranks.
SHARDED = Rank(
    stage=0,
    parameters=1000,
    updated=128,
    weights=2048,
    gradients=4096,
    main_parameters=512,
    states={"exp_avg": 512, "exp_pnorm": 512},
    main_gradients=0,
    buffers=(Buffer(1024, 1000, 1, param_bytes=2048, grad_bytes=4096, ranks=8),),
)
WHOLE = replace(
    SHARDED,
    stage=1,
    updated=1000,
    weights=2000,
    gradients=2000,
    main_parameters=4000,
    states={"exp_avg": 4000},
    main_gradients=4000,
    buffers=(Buffer(1000, 1000, 1, param_bytes=0, grad_bytes=2000, ranks=8),),
)


def plan(*stages: Rank) -> Plan:
    return Plan(
        name="made-up",
        optimizer="s3",
        gpus=16,
        layout={"tensor": 1, "pipeline": len(stages), "context": 1, "expert": 1, "data": 8},
        sharded=True,
        vocabulary=128,
        vocabulary_source="vocab_size",
        sizes=Sizes(parameters=2000, embeddings=500, stages=stages),
        activations=0,
        formula="mixtures of experts",
        norm=False,
        batch=32,
        sequence=64,
        steps=1000,
        flops=16e12,
        mfu=0.5,
        peak=1e12,
    )


def test_bytes_of_a_rank():
    assert SHARDED.total == 2048 + 4096 + 512 + 512 + 512
    assert WHOLE.total == 2000 + 2000 + 4000 + 4000 + 4000


def test_traffic_of_a_step():
    # gradient 4, main parameter 4, two states of 4; main parameter, states, bf16 weight
    assert SHARDED.traffic() == (128 * 16, 128 * 14)
    assert SHARDED.norm_traffic() == 128 * 4
    # bf16 gradient, copied to fp32 and read again, main parameter, state; the same and the weight
    assert WHOLE.traffic() == (1000 * (2 + 4 + 4 + 4), 1000 * (4 + 4 + 4 + 2))
    assert WHOLE.norm_traffic() == 4000
    # fp32 training: the weights are the main parameters
    single = replace(SHARDED, main_parameters=0, weights=4096)
    assert single.traffic() == (128 * 16, 128 * 12)


def test_what_a_ring_sends():
    assert SHARDED.reduced_and_gathered() == (4096 * 7 / 8, 2048 * 7 / 8)
    assert WHOLE.reduced_and_gathered() == (2 * 2000 * 7 / 8, 0)


def test_the_fullest_stage_and_the_time_are_named():
    made = plan(SHARDED, WHOLE, replace(WHOLE, stage=2), SHARDED)
    assert made.fullest.stage == 1
    assert made.step_seconds == 2.0
    lines = text(made).splitlines()
    assert "a rank of pipeline stage 1 of 0-3, the fullest" in lines
    assert any(line.split() == "total, stage 0 7.680 kB".split() for line in lines)
    assert any("Megatron's formula does not cover mixtures of experts" in line for line in lines)
    record = json.loads(json.dumps(as_json(made)))
    assert record["bytes_a_rank"] == 16000 and record["tokens"] == 32 * 64 * 1000
    assert record["days"] == pytest.approx(2000 / 86400)


def test_a_signal_that_comes_too_late_is_warned_of():
    # 2000 parameters: bf16 weights of padded buffers, main parameters and states of 12 bytes.
    made = plan(SHARDED)
    assert made.checkpoint == 2000 * (2 + 12)
    assert made.notice == pytest.approx(2.0 + 28e3 / 1e9)
    assert "WARNING" not in text(made)
    slow = replace(made, peak=1e10, evaluated=3)
    assert slow.notice == pytest.approx(200 + 3 * 200 / 3)
    last = text(slow).splitlines()[-1].split(maxsplit=3)
    assert last[:3] == ["WARNING", "180", "s"] and last[3].endswith("signal=B:USR1@420")
    assert "WARNING" not in text(replace(slow, signal=420))


@pytest.mark.parametrize(
    ("given", "seconds"), [(None, 180), ("B:USR1@600", 600), ("B:USR1", 60), ("B:USR1@1m", None)]
)
def test_the_seconds_of_the_signal(given, seconds):
    config = load(["tiny-s3"], [f"launch.sbatch.signal={given}"] if given else [])
    if seconds is None:
        with pytest.raises(ConfigError, match=r"signal=.*: signal must have the form .*@180, not"):
            _signal(config)
        return
    assert _signal(config) == seconds


def test_what_checkpoints_take_beside_the_step():
    """By Megatron's code: fp32 of the whole buffers, and of a bucket while it is put together."""
    args = {"use_distributed_optimizer": True, "ckpt_format": "torch_dist"}
    own = memory.checkpoint(Namespace(**args), SHARDED)
    rank = replace(SHARDED, buffers=(replace(SHARDED.buffers[0], largest=1024),))
    full = memory.checkpoint(Namespace(**args, dist_ckpt_optim_fully_reshardable=True), rank)
    assert own == memory.Checkpoint("dp_reshardable", 128 * 12, 128 * 12)
    assert full == memory.Checkpoint("fully_reshardable", 12_000 + 4096 * 2 + 1536, 12_000)
    parallel = Namespace(**args, ckpt_fully_parallel_load=True)
    assert memory.checkpoint(parallel, rank, "fully_reshardable").reading == 1500
    fp32 = replace(rank, main_parameters=0)
    assert memory.checkpoint(Namespace(**args), fp32).saving == 128 * 12
    for other in ({"ckpt_format": "torch"}, {"use_distributed_optimizer": False}):
        assert memory.checkpoint(Namespace(**args | other), rank) is None
    assert "\ncheckpoints" not in text(plan(SHARDED))
    lines = text(replace(plan(SHARDED), saved=full, otherwise=own)).splitlines()
    (at,) = (n for n, line in enumerate(lines) if line.startswith("checkpoints"))
    assert "without --dist-ckpt-optim-fully-reshardable 1.536 kB, read 1.536 kB" in lines[at]
    assert lines[at + 1].split()[:5] == "a save takes 21.728 kB".split()
    assert lines[at + 2].endswith("192.000 kB in all")
    lines = text(replace(plan(SHARDED), saved=own, otherwise=full)).splitlines()
    assert "save once with --dist-ckpt-optim-fully-reshardable: 21.728 kB in each" in lines[at]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--gpus", "10240", "--set", "tensor_model_parallel_size=8"],
            "global_batch_size 1024 does not divide by micro_batch_size 1 "
            "(configs/layouts/gpt2-7b/8gpu.yaml:4) x 1280 data-parallel ranks (10240 ranks, tensor "
            "8 x pipeline 1 x context 1); 1280 would, or 8192 ranks",
        ),
        (["--gpus", "7"], "1 nodes x 7 ranks = 7 ranks do not divide by tensor 2"),
        (["--set", "rampup_batch_size=[1, 1, 9]"], "rampup_batch_size cannot be planned"),
        (["--json", "no/such/folder/plan.json"], "the folder no/such/folder does not exist"),
    ],
)
def test_refusals(words, message, capsys):
    assert main(["gpt2-7b-s3", *words]) == 2
    assert message in capsys.readouterr().err


def test_sharded_muon_is_refused():
    """Its optimizer is a chain in a chain, which the plan does not look into."""
    from megatron_s3.mcore.planning import job

    with pytest.raises(ValueError, match=r"^--use-distributed-optimizer with Muon cannot be pl"):
        job._rank(Namespace(use_layer_wise_distributed_optimizer=True), 0)


def test_a_model_that_megatron_does_not_build_here_is_refused(monkeypatch, capsys):
    """As multi-latent attention, whose layers need a GPU."""
    from megatron_s3.launch import planning as module
    from megatron_s3.mcore.planning import job

    def fails(args):
        raise TypeError("unexpected keyword argument 'k_channels'")

    monkeypatch.setattr(module, "check", lambda config, more: Namespace(**ARGS))
    monkeypatch.setattr(job, "completed", fails)
    assert main(["tiny-s3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "[megatron_s3] computing the sizes with Megatron; the import takes a few seconds",
        "error: tiny-s3: cannot be planned: Megatron does not build this model without a GPU: "
        "TypeError: unexpected keyword argument 'k_channels'",
    ]


def test_the_vocabulary_is_the_datasets_where_it_is(monkeypatch):
    config = load(["gpt2-7b-s3"], ["dataset=far/away"])
    words, source = _vocabulary(config)
    assert words == [] and source.endswith("; dataset far/away does not exist here")
    monkeypatch.setattr(data, "megatron_arguments", lambda prefix: ["--tokenizer-type", "X"])
    monkeypatch.setattr(data, "load", lambda prefix: {"tokenizer": {"vocab_size": 1234}})
    words, source = _vocabulary(config)
    assert words == ["--tokenizer-type", "X", "--vocab-size", "1234"]
    assert source == "the dataset far/away"


@pytest.mark.parametrize("words", [["--mfu", "1.5"], ["--gpus", "0"], ["--peak-tflops", "inf"]])
def test_options_are_checked(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["gpt2-7b-s3", *words])
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_folder_for_the_numbers_is_refused_before_the_plan(tmp_path, capsys):
    assert main(["tiny-s3", "--json", str(tmp_path)]) == 2
    assert f"--json {tmp_path}: it is a folder; name a file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "tensor", "batch"),
    [(64, 2, 1024), pytest.param(10240, 8, 1280, marks=pytest.mark.thorough)],
)
def test_gpt2_7b(tmp_path, gpus, tensor, batch):
    """By hand: weights of 2 bytes and gradients of 4 on every rank, 12 bytes an element sharded."""
    sets = [f"tensor_model_parallel_size={tensor}", f"global_batch_size={batch}"]
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "megatron_s3.cli", "plan", "gpt2-7b-s3", f"--gpus={gpus}"]
    ran = subprocess.run(
        [*command, *(f"--set={word}" for word in sets), "--json", str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr == (
        "[megatron_s3] computing the sizes with Megatron; the import takes a few seconds\n"
    )
    found = json.loads(out.read_text())
    hidden, layers = 4096, 32
    vocabulary = -(-50257 // (128 * tensor)) * 128 * tensor
    embeddings = (vocabulary + 4096) * hidden
    block = 12 * hidden**2 + 13 * hidden
    assert found["vocabulary"] == vocabulary
    assert found["sizes"]["embeddings"] == embeddings
    assert found["sizes"]["parameters"] == embeddings + layers * block + 2 * hidden
    (rank,) = found["sizes"]["stages"]
    data = gpus // tensor
    elements = sum(b["elements"] for b in rank["buffers"])
    assert 0 <= elements - rank["parameters"] < 64 * 400 + data * 128
    assert rank["weights"] == 2 * elements and rank["gradients"] == 4 * elements
    assert rank["updated"] == pytest.approx(elements / data, rel=1e-3)
    assert rank["main_parameters"] == rank["states"]["exp_pnorm"] == 4 * rank["updated"]
    assert found["tokens"] == 50000 * batch * 4096
    # 6 operations a parameter and token and those of attention, which Megatron counts too
    dense = 6 * found["sizes"]["parameters"] * batch * 4096
    assert 1 < found["flops"] / dense < 1.15
