"""What the flags do, through Megatron's own parser and validation."""

import argparse
import sys

import pytest
import torch

from megatron_s3.optimizers import S3
from tests.harness.models import TINY
from tests.mcore.library import on_ranks


def parse(*flags):
    from megatron.training.arguments import parse_args, validate_args

    sys.argv = ["pretrain", *TINY, "--train-iters", "6", *flags]
    args = parse_args()
    validate_args(args, {"tokenizer_type": "NullTokenizer"})
    return args


def s3(*flags):
    return parse("--optimizer", "s3", *flags)


AWARE = ("--bf16", "--use-distributed-optimizer", "--use-precision-aware-optimizer")
MEGATRON_FSDP = ("--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor")
EXP_AVG, EXP_AVG_SQ = "--exp-avg-dtype", "--exp-avg-sq-dtype"
OFFLOAD, FRACTION = "--optimizer-cpu-offload", "--optimizer-offload-fraction"
GRADS_IN_FP32 = "--accumulate-allreduce-grads-in-fp32"


@on_ranks()
def test_the_defaults():
    args = s3("--use-distributed-optimizer")
    assert args.optimizer == "s3" and args.use_distributed_optimizer
    assert not getattr(args, "use_layer_wise_distributed_optimizer", 0)
    assert args.clip_grad == 0.0 and type(args.clip_grad) is float
    named = {h.name: getattr(args, f"s3_{h.name}") for h in S3.description.hyperparameters}
    assert named == {
        "beta": 0.95,
        "p": 3.0,
        "beta2": None,
        "nesterov": True,
        "bias_correction": False,
        "beta_ramp": False,
        "grad_bound": None,
        "cautious": False,
        "cautious_steps": None,
    }


@on_ranks()
def test_each_flag_has_its_effect():
    args = s3("--s3-beta", ".9", "--s3-p", "2", "--s3-beta2", ".99", "--s3-no-nesterov")
    assert (args.s3_beta, args.s3_p, args.s3_beta2, args.s3_nesterov) == (0.9, 2.0, 0.99, False)
    assert s3("--s3-bias-correction").s3_bias_correction is True
    args = s3(
        *("--s3-beta-ramp", "--s3-grad-bound", "10", "--s3-cautious", "--s3-cautious-steps", "4000")
    )
    assert args.s3_cautious_steps == 4000
    assert args.s3_grad_bound == 10.0 and args.s3_beta_ramp is True and args.s3_cautious is True
    assert s3("--plugin-log-updates", "--tensorboard-dir", "here").plugin_metrics
    assert s3("--clip-grad", "1.0").clip_grad == 1.0
    assert s3(*MEGATRON_FSDP).use_distributed_optimizer


@on_ranks()
def test_flags_that_exclude_each_other_are_refused_before_training():
    with pytest.raises(ValueError, match="cautious_steps=4000 has no effect without cautious"):
        s3("--s3-cautious-steps", "4000")
    with pytest.raises(ValueError, match="beta_ramp and bias_correction exclude each other"):
        s3("--s3-beta-ramp", "--s3-bias-correction")


@on_ranks()
def test_switches_have_their_old_names_too():
    """In a flag and in a configuration that a program has made."""
    import contextlib
    import io
    from types import SimpleNamespace

    from megatron_s3.mcore.arguments.readers import needs_grad_norm, switches

    args = s3("--s3-no-fused", "--s3-metrics", "--s3-device", "cpu", "--tensorboard-dir", "here")
    assert args.plugin_no_fused and args.plugin_metrics and args.plugin_device == "cpu"
    assert not args.plugin_log_updates and not hasattr(args, "s3_no_fused")
    config = SimpleNamespace(s3_log_grad_norm=True, clip_grad=0.0)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert switches(config)["plugin_log_grad_norm"] and needs_grad_norm(config)
    assert said.getvalue().count("s3_log_grad_norm is called plugin_log_grad_norm now") == 1


@on_ranks()
def test_adam_has_its_own_defaults():
    args = parse("--optimizer", "adam")
    assert args.clip_grad == 1.0 and type(args.clip_grad) is float
    assert "_s3_upstream_defaults" not in vars(args)


@on_ranks()
def test_dtypes_of_the_states():
    args = s3(*AWARE, EXP_AVG, "bf16", EXP_AVG_SQ, "bf16", "--main-grads-dtype", "bf16")
    assert (args.exp_avg_dtype, args.exp_avg_sq_dtype) == (torch.bfloat16, torch.bfloat16)
    assert not args.accumulate_allreduce_grads_in_fp32
    fp16 = s3("--fp16", *AWARE[1:], GRADS_IN_FP32, EXP_AVG, "bf16")
    assert fp16.use_precision_aware_optimizer
    assert s3(*AWARE, EXP_AVG, "bf16", "--s3-beta", ".99").exp_avg_dtype == torch.bfloat16
    args = s3(*AWARE, OFFLOAD, FRACTION, ".5")
    assert args.optimizer_cpu_offload and args.optimizer_offload_fraction == 0.5


@on_ranks()
def test_the_optimizers_configuration_is_what_was_asked_for():
    """Its own flags, and what Megatron's configuration refuses to have from the start."""
    from megatron.training.training import get_megatron_optimizer_config

    args = s3(
        *(*AWARE, EXP_AVG, "bf16", EXP_AVG_SQ, "bf16", "--main-grads-dtype", "bf16"),
        *("--s3-beta", ".9", "--plugin-log-grad-norm"),
    )
    asked = {
        "optimizer": "s3",
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
        "main_grads_dtype": torch.bfloat16,
        "main_params_dtype": torch.float32,
        "s3_beta": 0.9,
        "s3_p": 3.0,
        "plugin_log_grad_norm": True,
        "plugin_no_fused": False,
    }
    before = dict(vars(args))
    config, _ = get_megatron_optimizer_config(args)
    assert {name: getattr(config, name) for name in asked} == asked
    assert vars(args) == before


REFUSED = {
    ("--s3-beta", "1.0"): r"--s3-beta must be in \[0, 1\), not 1\.0",
    ("--s3-beta", "nan"): r"--s3-beta must be in",
    ("--s3-beta2", "-0.1"): r"--s3-beta2 must be in",
    ("--s3-grad-bound", "0.5"): r"--s3-grad-bound must be in \[1, inf\), not 0\.5",
    ("--s3-p", "0.5"): r"--s3-p must be in \[1, inf\), not 0\.5",
    ("--s3-p", "inf"): r"--s3-p must be in",
    ("--distributed-backend", "nccl"): "--distributed-backend nccl needs GPUs",
    (*AWARE, EXP_AVG, "fp16"): "--exp-avg-dtype fp16: .+ smallest number is 6e-8",
    (*AWARE, EXP_AVG_SQ, "fp8"): "--exp-avg-sq-dtype fp8: .+ too coarse",
    (*AWARE, EXP_AVG, "fp8", "--s3-beta2", ".99"): "--exp-avg-dtype fp8: .+ beta2=0.99: int8 holds",
    (*AWARE, "--main-params-dtype", "fp16"): "--main-params-dtype fp16 is not supported",
    # 1 - 0.99 is above 2**-8, 1 - 0.99**(1/3) below.
    (*AWARE, EXP_AVG_SQ, "bf16", "--s3-beta", ".99"): "--exp-avg-sq-dtype bf16: .+ beta=0.99",
    (*AWARE, EXP_AVG, "bf16", "--s3-beta", ".999"): "--exp-avg-dtype bf16: .+ smaller beta",
    ("--bf16", "--plugin-no-param-remainders"): "-remainders has no effect here: main parameters",
    (*AWARE, OFFLOAD, FRACTION, "1", "--plugin-no-param-remainders"): "-remainders has no effect",
    (*AWARE, "--fp8-param-gather"): "--fp8-param-gather with --use-precision-aware-optimizer",
    (AWARE[0], AWARE[2]): "--use-precision-aware-optimizer needs --use-distributed-optimizer",
    ("--fp16", *AWARE[1:]): f"with --fp16 needs {GRADS_IN_FP32}",
    ("--bf16", EXP_AVG, "bf16"): "--exp-avg-dtype bf16 is a flag of --use-precision-aware-opt",
    (*AWARE, "--main-grads-dtype", "bf16", *MEGATRON_FSDP): "bf16 has no effect with --use-megat",
    ("--optimizer-cuda-graph",): "does not support --optimizer-cuda-graph here: .+ on the CPU",
    (*AWARE[:2], OFFLOAD): "with --optimizer-cpu-offload needs --use-precision-aware-optimizer",
    (*AWARE, OFFLOAD, FRACTION, "0"): r"--optimizer-offload-fraction 0.0 must be in \(0, 1\]",
    (*AWARE, OFFLOAD, FRACTION, "1.5"): "--optimizer-offload-fraction 1.5 must be in",
    (*AWARE, OFFLOAD, "--async-save"): "with --optimizer-cpu-offload does not support --async-save",
    (*AWARE, OFFLOAD, "--optimizer-cuda-graph"): "does not support --optimizer-cuda-graph: a graph",
}


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
@on_ranks()
def test_what_s3_cannot_do_is_refused(flags):
    with pytest.raises(ValueError, match=REFUSED[flags]):
        s3(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--s3-p 2", "--s3-p is a flag of --optimizer s3"),
        ("--plugin-log-updates", "--plugin-log-updates does nothing with --optimizer adam"),
        ("--plugin-log-grad-norm", "--plugin-log-grad-norm does nothing with --optimizer adam"),
        ("--plugin-no-fused", "--plugin-no-fused does nothing with --optimizer adam"),
    ],
)
@on_ranks()
def test_what_adam_has_nothing_of_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse("--optimizer", "adam", *flags.split())


@on_ranks()
def test_a_switch_for_what_muon_leaves_is_taken():
    muon = ("--optimizer", "muon", "--muon-scalar-optimizer")
    assert parse(*muon, "s3", "--plugin-no-fused").plugin_no_fused
    with pytest.raises(ValueError, match="--plugin-no-fused does nothing with --optimizer muon"):
        parse(*muon, "adam", "--plugin-no-fused")


GRAPH = {
    "optimizer_cuda_graph": True,
    "plugin_no_fused": False,
    "plugin_log_updates": False,
    "fp16": False,
    "loss_scale": None,
    "weight_decay_incr_style": "constant",
    "s3_bias_correction": False,
    "s3_beta_ramp": False,
    "s3_cautious": True,
}


def test_what_a_replayed_step_cannot_do_is_refused(monkeypatch):
    """As for GPUs."""
    from megatron_s3.mcore.arguments import checks

    monkeypatch.setattr(checks.cpu_device, "active", lambda: False)
    checks.check_cuda_graph(argparse.Namespace(**GRAPH), S3)
    for name, value in {
        "plugin_no_fused": True,
        "plugin_log_updates": True,
        "fp16": True,
        "weight_decay_incr_style": "linear",
        "use_megatron_fsdp": True,
        "s3_bias_correction": True,
        "s3_beta_ramp": True,
        "s3_cautious_steps": 4000.0,
    }.items():
        changed = argparse.Namespace(**GRAPH | {name: value})
        with pytest.raises(ValueError, match="--optimizer-cuda-graph here"):
            checks.check_cuda_graph(changed, S3)

    class Late(S3):
        """Changes what a graph records, but late."""

        def group_hyperparameters(self, group):
            late = group["step"] > 10_000
            return super().group_hyperparameters(group) | {"beta": 0.98 if late else 0.95}

    with pytest.raises(ValueError, match="--optimizer-cuda-graph here"):
        checks.check_cuda_graph(argparse.Namespace(**GRAPH), Late)
