"""One process: what the flags do, through Megatron's own parser and validation."""

import sys

import pytest

import megatron_s3

megatron_s3.register()

from megatron.training.arguments import parse_args, validate_args  # noqa: E402

from megatron_s3.optimizers import S3  # noqa: E402
from tests.trainer import TINY  # noqa: E402


def parse(*flags: str):
    sys.argv = ["pretrain", *TINY, "--train-iters", "6", *flags]
    args = parse_args()
    validate_args(args, {"tokenizer_type": "NullTokenizer"})
    return args


def refused(*flags: str, with_message: str) -> None:
    with pytest.raises(ValueError, match=with_message):
        parse(*flags)


def s3(*flags: str):
    return parse("--optimizer", "s3", *flags)


args = s3("--use-distributed-optimizer")
assert args.optimizer == "s3"
assert args.use_distributed_optimizer and not getattr(
    args, "use_layer_wise_distributed_optimizer", 0
)
assert (args.s3_beta, args.s3_p, args.s3_beta2) == (0.95, 3.0, None)
assert (args.s3_nesterov, args.s3_bias_correction) == (True, False)
assert args.clip_grad == 0.0 and type(args.clip_grad) is float

args = s3("--s3-beta", ".9", "--s3-p", "2", "--s3-beta2", ".99", "--s3-no-nesterov")
assert (args.s3_beta, args.s3_p, args.s3_beta2, args.s3_nesterov) == (0.9, 2.0, 0.99, False)
assert s3("--s3-bias-correction").s3_bias_correction is True
assert s3("--clip-grad", "1.0").clip_grad == 1.0

args = parse("--optimizer", "adam")
assert args.clip_grad == 1.0 and type(args.clip_grad) is float
assert "_s3_upstream_defaults" not in vars(args)

for flags, message in {
    ("--s3-beta", "1.0"): r"--s3-beta must be in \[0, 1\), not 1\.0",
    ("--s3-beta", "nan"): r"--s3-beta must be in",
    ("--s3-beta2", "-0.1"): r"--s3-beta2 must be in",
    ("--s3-p", "0.5"): r"--s3-p must be in \[1, inf\), not 0\.5",
    ("--s3-p", "inf"): r"--s3-p must be in",
    ("--optimizer-cpu-offload",): "does not support --optimizer-cpu-offload: .+--optimizer adam",
    ("--use-megatron-fsdp",): "does not support --use-megatron-fsdp",
    ("--use-torch-fsdp2",): "does not support --use-torch-fsdp2",
    ("--distributed-backend", "nccl"): "--distributed-backend nccl needs GPUs",
}.items():
    refused("--optimizer", "s3", *flags, with_message=message)
refused("--optimizer", "adam", "--s3-p", "2", with_message="--s3-p is a flag of --optimizer s3")
for flag in ("--s3-log-max-update", "--s3-log-grad-norm"):
    refused("--optimizer", "adam", flag, with_message=f"{flag} does nothing with --optimizer adam")

assert len(S3.description.hyperparameters) == 5, "a flag is not tested here"
print("arguments: ok")
