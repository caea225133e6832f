"""What Megatron accepts and does not do: it is done, or refused before training."""

import re
from argparse import Namespace

import pytest

from tests.harness.releases import INSTALLED, RELEASES
from tests.harness.trainer import train
from tests.mcore.library import build, on_ranks

RATES = {"lr": 1e-3, "min_lr": 0.0, "decoupled_lr": None, "decoupled_min_lr": None}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", ["s3", "adam"])
@on_ranks(1)
def test_the_checkpoints_weight_decay_is_in_force_at_once(name, release):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    def schedule(decay, **more):
        _, optimizer = build(name)
        rates = {"init_lr": 0.0, "max_lr": 1e-3, "min_lr": 0.0, "lr_warmup_steps": 0}
        decays = {"start_wd": decay, "end_wd": decay, "wd_incr_steps": 10}
        styles = {"lr_decay_style": "constant", "wd_incr_style": "constant", "lr_decay_steps": 10}
        return OptimizerParamScheduler(optimizer, **rates, **decays, **styles, **more), optimizer

    saved, _ = schedule(0.5)
    saved.step(3)
    given = {
        0.5: {"use_checkpoint_opt_param_scheduler": True, "override_opt_param_scheduler": False},
        0.1: {"use_checkpoint_opt_param_scheduler": False, "override_opt_param_scheduler": True},
    }
    for decay, flags in given.items():
        resumed, optimizer = schedule(0.1, **flags)
        resumed.load_state_dict(saved.state_dict())
        found = [(g["weight_decay"], g.get("wd_mult", 1.0)) for g in optimizer.param_groups]
        assert found and all(own == decay * mult for own, mult in found)
        assert any(mult for _, mult in found)
        assert resumed.num_steps == 3


@on_ranks(1)
def test_another_weight_decay_is_said_before_anything_is_loaded():
    from megatron_s3.mcore.checkpoint import differences

    saved = Namespace(**RATES, weight_decay=0.01)
    now = Namespace(**RATES, weight_decay=0.1, weight_decay_incr_style="constant")
    with pytest.raises(ValueError, match=r"saved with --weight-decay 0\.01, and this run has .*"):
        differences.compare_rates("d", now, saved)
    now.use_checkpoint_opt_param_scheduler = True
    differences.compare_rates("d", now, saved)


@on_ranks(1)
def test_a_vocabulary_padded_further_is_refused():
    from megatron_s3.mcore.checkpoint.differences import compare_vocabularies

    def compare(then, now, ranks):
        saved = Namespace(padded_vocab_size=then, vocab_size=250)
        running = Namespace(padded_vocab_size=now, vocab_size=250, tensor_model_parallel_size=ranks)
        compare_vocabularies("d", running, saved)

    compare(256, 256, 2)
    compare(512, 256, 1)  # rows that stand for nothing are left out
    compare(None, 256, 1)
    with pytest.raises(ValueError, match=r"padded to 256 .* pads it to 512: the 256 new .*by 64,"):
        compare(256, 512, 4)
    with pytest.raises(ValueError, match="Use a --tensor-model-parallel-size that divides 253"):
        compare(253, 256, 2)


@pytest.mark.slow
def test_rampup_is_refused_where_it_has_no_effect():
    ramp = ["--rampup-batch-size", "4", "4", "64", "--global-batch-size", "16"]
    for name in ("s3", "adam"):
        run = train("--optimizer", name, *ramp, check=False)
        assert run.returncode and not run.losses
        assert re.search(r"--rampup-batch-size 4 4 64 has no effect .* Give --step-batch", run.log)
    assert INSTALLED != "0.17.1"  # which still ramps up


@pytest.mark.slow
def test_an_odd_vocabulary_at_another_size_is_refused(tmp_path):
    # With the end of document 240: that on 1 rank, 256 on 2.
    odd = ["--optimizer", "s3", "--make-vocab-size-divisible-by", "16", "--vocab-size", "239"]
    odd += ["--save-interval", "3"]
    train(*odd, "--save", tmp_path)
    two = [*odd, "--load", tmp_path, "--ckpt-step", 3, "--tensor-model-parallel-size", 2]
    run = train(*two, ranks=2, check=False)
    assert "padded to 240 tokens, and this run pads it to 256" in run.log and not run.losses
    mended = train(*two, "--make-vocab-size-divisible-by", 120, ranks=2)
    assert 6 in mended.losses
