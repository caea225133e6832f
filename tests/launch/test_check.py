"""What is refused before anything starts; Megatron's own parser, in one process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_s3.launch.check import arithmetic
from megatron_s3.launch.config import ConfigError, load

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
        (["micro_batch_size=1.5"], "micro_batch_size must be a whole number from 1, not '1.5'"),
        (["micro_batch_size=null"], "micro_batch_size is given by no file"),
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
        "s3_p=0.5": "Megatron refuses it: --s3-p must be in [1, inf), not 0.5; given: s3_p (--set "
        "s3_p=0.5)",
        "num_attention_heads=33": "hidden_size % args.num_attention_heads == 0",
        "optimizer=adam": "--s3-beta is a flag of --optimizer s3, but this is --optimizer adam",
        "fp16=true": "given: bf16 (configs/base.yaml:",
    }
    run = subprocess.run(
        [sys.executable, "-c", ASK, *cases],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    for (word, wanted), said in zip(cases.items(), run.stdout.splitlines(), strict=True):
        assert wanted in said, word
