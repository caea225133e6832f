"""What is refused before anything starts; Megatron's own parser, in one process of its own."""

import os
import re
from pathlib import Path

import pytest

from megatron_s3.launch import check
from megatron_s3.launch.check import arithmetic, schedule
from megatron_s3.launch.config import ConfigError, load
from tests.harness import fresh

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["launch.nodes=3"],
            "configs/models/gpt2-7b.yaml:9: global_batch_size 1024 does not divide by "
            "micro_batch_size 1 (configs/layouts/gpt2-7b/8gpu.yaml:4) x 12 data-parallel ranks "
            "(24 ranks, tensor 2 x pipeline 1 x context 1); 1020 would, or 16 ranks",
        ),
        (
            ["tensor_model_parallel_size=3"],
            "--set tensor_model_parallel_size=3, configs/layouts/gpt2-7b/8gpu.yaml:8, "
            "configs/layouts/gpt2-7b/8gpu.yaml:9: 1 nodes x 8 ranks = 8 ranks do not divide by "
            "tensor 3 x pipeline 1 x context 1 = 3",
        ),
        (
            ["micro_batch_size=1.5"],
            "micro_batch_size must be a whole number of at least 1, not '1.5'",
        ),
        (["micro_batch_size=null"], "no file sets micro_batch_size"),
    ],
)
def test_what_does_not_divide_is_refused(sets, message):
    with pytest.raises(ConfigError) as error:
        arithmetic(load(["gpt2-7b-s3"], sets))
    assert message in str(error.value)


def test_the_batch_is_divided():
    assert arithmetic(load(["gpt2-7b-s3", "layouts/gpt2-7b/64gpu"])) == {
        "world_size": 64,
        "tensor": 2,
        "pipeline": 1,
        "context": 1,
        "data_parallel": 32,
        "micro_batch_size": 1,
        "global_batch_size": 1024,
        "micro_batches": 32,
    }


# In a process of its own: asking Megatron changes torch and Megatron for good.
ASK = """
import sys
from megatron_s3.launch.check import check
from megatron_s3.launch.config import ConfigError, load
for word in sys.argv[1:]:
    try:
        args = check(load(["gpt2-7b-s3"], [word]))
        print(args.optimizer, args.data_parallel_size, args.use_distributed_optimizer)
    except ConfigError as error:
        print(error)
"""


def test_megatron_is_asked_and_its_refusals_name_the_lines():
    cases = {
        "seed=1": "s3 4 True",
        "num_layer=3": "--set num_layer=3: this Megatron has no argument 'num_layer'; did you mean "
        "num_layers",
        "lr=fast": "--set lr=fast: lr must be a number, not 'fast'",
        "seed=abc": "--set seed=abc: seed: invalid int value: 'abc'",
        "bf16=yes please": "--set bf16=yes please: bf16 is a switch: true or false",
        "seed=[1, 2]": "--set seed=[1, 2]: seed takes one value, not a list",
        "seed=true": "--set seed=true: seed needs a value",
        "optimizer=adamw2": "--set optimizer=adamw2: optimizer: invalid choice: 'adamw2'",
        "s3_p=0.5": "--set s3_p=0.5: s3_p must be in [1, inf), not 0.5",
        "launch.environment.CUDA_DEVICE_MAX_CONNECTIONS=8": "CUDA_DEVICE_MAX_CONNECTIONS=8 (--set "
        "launch.environment.CUDA_DEVICE_MAX_CONNECTIONS=8)",
        "launch.environment.CUDA_DEVICE_MAX_CONNECTIONS=null": "Megatron rejects it: Using "
        "tensor model parallelism",
        "min_lr=1": "assert args.min_lr <= args.lr",
        "lr_decay_style=WSD": "wsd_decay_steps is not None",
        "num_attention_heads=33": "hidden_size % args.num_attention_heads == 0",
        "optimizer=adam": "--plugin-log-updates does nothing with --optimizer adam",
        "fp16=true": "given: bf16 (configs/base.yaml:",
        'plugin_overrides=["*embedding*: optimizer=adamw lr=1e-4", "*bias: lr=0"]': "s3 4 True",
        "plugin_overrides=lr=1": "plugin_overrides: --plugin-overrides 'lr=1': a rule is 'PATTERN",
        'plugin_overrides=["*: optimizer=adamx"]': "sets optimizer='adamx', which is no optimizer",
    }
    run = fresh.run(
        *("-c", ASK, *cases),
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    for (word, wanted), said in zip(cases.items(), run.stdout.splitlines(), strict=True):
        assert wanted in said, word


# What CUDA_DEVICE_MAX_CONNECTIONS must not be 1 for.
FSDP = """
from megatron_s3.launch.check import check
from megatron_s3.launch.config import ConfigError, load
sets = ["use_megatron_fsdp=true", "ckpt_format=fsdp_dtensor", "tensor_model_parallel_size=null",
        "sequence_parallel=null", "dist_ckpt_optim_fully_reshardable=null", "micro_batch_size=1",
        "untie_embeddings_and_output_weights=true", "gradient_accumulation_fusion=false"]
for value in ("1", "8", "null"):
    word = "launch.environment.CUDA_DEVICE_MAX_CONNECTIONS=" + value
    try:
        check(load(["gpt2-7b-s3"], [*sets, word]))
        print("accepted")
    except ConfigError as error:
        print(error)
"""


def test_megatron_is_asked_in_the_environment_of_the_ranks():
    run = fresh.run(
        *("-c", FSDP),
        env={k: v for k, v in os.environ.items() if k != "CUDA_DEVICE_MAX_CONNECTIONS"}
        | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    one, several, none = run.stdout.splitlines()
    assert "FSDP requires CUDA_DEVICE_MAX_CONNECTIONS > 1 or unset" in one
    assert (several, none) == ("accepted", "accepted")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["train_iters=100"],
            "configs/base.yaml:7: lr_warmup_iters 5000 is not shorter than train_iters 100 (--set "
            "train_iters=100), so the learning rate has no time to decay; use a shorter warmup "
            "(--set lr_warmup_iters=10)",
        ),
        (["lr_decay_iters=5000"], "is not shorter than lr_decay_iters 5000 (--set"),
        (
            ["lr_warmup_iters=null", "lr_warmup_fraction=1.0"],
            "--set lr_warmup_fraction=1.0: lr_warmup_fraction 1.0 is not shorter than train_iters",
        ),
        (
            [
                *("train_iters=null", "lr_warmup_iters=null"),
                *("train_samples=1000", "lr_warmup_samples=1000"),
            ],
            "lr_warmup_samples 1000 is not shorter than train_samples 1000",
        ),
        (["lr_warmup_iters=-1"], "lr_warmup_iters must be a whole number of at least 0, not '-1'"),
    ],
)
def test_a_warmup_as_long_as_the_schedule_is_refused(sets, message):
    with pytest.raises(ConfigError) as error:
        schedule(load(["gpt2-345m-s3"], sets))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["train_iters=5001"],
        ["lr_warmup_iters=0", "train_iters=1"],
        ["lr_warmup_iters=null", "train_iters=1"],
        ["train_iters=null", "train_samples=9", "lr_warmup_samples=8"],
    ],
)
def test_a_warmup_within_the_schedule_is_accepted(sets):
    schedule(load(["gpt2-345m-s3"], sets))


def test_missing_gpus_are_counted(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = load(["gpt2-7b-s3"])
    with pytest.raises(ConfigError) as error:
        check.refuse_missing_gpus(config)
    assert re.sub(r"(yaml):\d+", r"\1:LINE", str(error.value)) == (
        "torch finds 4 GPUs on this node, and the configuration needs 8 (launch.nproc_per_node, "
        "configs/layouts/gpt2-7b/8gpu.yaml:LINE; plugin_device cuda, configs/base.yaml:LINE); "
        "set plugin_device=cpu to train without GPUs"
    )
    check.refuse_missing_gpus(load(["gpt2-7b-s3"], ["launch.nproc_per_node=4"]))
    check.refuse_missing_gpus(load(["tiny-s3"]))
