"""What of a checkpoint's run is another in this one: each name that counts, alone."""

from argparse import Namespace

import pytest

from tests.mcore.checkpoints import flags, write
from tests.mcore.library import on_ranks

RATES = {
    "lr": 1e-3,
    "min_lr": 1e-4,
    "decoupled_lr": 2e-3,
    "decoupled_min_lr": 2e-4,
    "weight_decay": 0.1,
    "weight_decay_incr_style": "linear",
    "start_weight_decay": 0.01,
    "end_weight_decay": 0.2,
}


@on_ranks()
@pytest.mark.parametrize("name", [name for name in RATES if name != "weight_decay_incr_style"])
def test_each_rate_that_differs_is_refused_or_said(name):
    import contextlib
    import io

    from megatron_s3.mcore.checkpoint.differences import compare_rates

    saved = Namespace(**RATES)
    compare_rates("there", Namespace(**RATES), saved)
    now = Namespace(**(RATES | {name: 0.5}))
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{flag} {RATES[name]}, and this run has {flag} 0.5"):
        compare_rates("there", now, saved)
    for decides, words in (
        ("override_opt_param_scheduler", f"the run continues with {flag} 0.5"),
        ("use_checkpoint_opt_param_scheduler", f"the run uses these values instead of {flag} 0.5"),
    ):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            compare_rates("there", Namespace(**vars(now), **{decides: True}), saved)
        assert words in said.getvalue()


@on_ranks()
@pytest.mark.parametrize("style", ["constant", "linear"])
def test_the_arguments_are_the_rates_that_are_used(style):
    """A run that takes the checkpoint's logs and saves them, and the next one compares them."""
    from megatron_s3.mcore.checkpoint.differences import compare_rates, in_force

    other = dict.fromkeys(RATES, 0.5) | {"decoupled_lr": None, "weight_decay_incr_style": style}
    now = Namespace(**other, use_checkpoint_opt_param_scheduler=True)
    saved = RATES | {"weight_decay_incr_style": style}
    if style == "constant":  # the ends are the weight decay, by Megatron's validation
        saved |= {"start_weight_decay": 0.1, "end_weight_decay": 0.1}
    compare_rates("there", now, Namespace(**saved))
    assert {name: getattr(now, name) for name in RATES} == saved | {"decoupled_lr": None}

    used = {"max_lr": 0.7, "min_lr": 0.6, "start_wd": 0.5, "end_wd": 0.4, "num_steps": 3}
    rates = vars(in_force(Namespace(**saved), used))
    names = ("lr", "min_lr", "weight_decay", "start_weight_decay", "end_weight_decay")
    decay = 0.5 if style == "constant" else 0.1
    assert [rates[name] for name in names] == [0.7, 0.6, decay, 0.5, 0.4]
    assert vars(in_force(Namespace(**saved), None)) == saved


@on_ranks()
def test_ends_of_a_decay_that_stays_are_not_compared():
    """Megatron sets them to the weight decay where it does not change."""
    from megatron_s3.mcore.checkpoint.differences import compare_rates

    constant = RATES | {"weight_decay_incr_style": "constant"}
    other = constant | {"start_weight_decay": 0.3, "end_weight_decay": 0.3}
    compare_rates("there", Namespace(**other), Namespace(**constant))


@on_ranks()
@pytest.mark.parametrize(
    ("now", "then", "advice"),
    [
        ((512, 4), (384, 1), "--make-vocab-size-divisible-by 96, which pads to 384"),
        ((512, 4), (385, 1), "a --tensor-model-parallel-size that divides 385"),
        ((384, 1), (512, 4), None),  # rows are left out, and none is untrained
        ((512, 2), (384, 2), None),  # another tokenizer's
        ((512, 2), (None, 1), None),
    ],
)
def test_a_vocabulary_that_would_be_padded_with_more_is_refused(now, then, advice):
    from megatron_s3.mcore.checkpoint.differences import compare_vocabularies

    here, there = (
        Namespace(
            padded_vocab_size=size, make_vocab_size_divisible_by=128, tensor_model_parallel_size=tp
        )
        for size, tp in (now, then)
    )
    if advice is None:
        compare_vocabularies("there", here, there)
    else:
        with pytest.raises(ValueError, match=f"128 new ones|127 new ones.*{advice}") as caught:
            compare_vocabularies("there", here, there)
        assert advice in str(caught.value)


@on_ranks()
def test_what_may_differ_between_two_runs_is_said():
    """A hyperparameter that does not fix the state's meaning, and the state's precision."""
    import contextlib
    import io

    import torch

    from megatron_s3.mcore.checkpoint.differences import compare_optimizers

    def said(optimizer="s3", **then):
        now = Namespace(optimizer=optimizer, s3_beta=0.95, use_precision_aware_optimizer=True)
        now.muon_scalar_optimizer = "s3" if optimizer == "muon" else "adam"
        now.exp_avg_dtype = now.exp_avg_sq_dtype = torch.float32
        with contextlib.redirect_stdout(io.StringIO()) as lines:
            compare_optimizers("there", now, Namespace(**vars(now) | then))
        return lines.getvalue().splitlines()

    assert said() == []
    assert said(s3_beta=0.9) == [
        "[megatron_s3] there was saved with beta=0.9; the run continues with beta=0.95"
    ]
    assert said("muon") == []
    assert said("muon", s3_cautious=True) == [
        "[megatron_s3] there was saved with cautious=True; the run continues with cautious=False"
    ]
    assert said(exp_avg_dtype=torch.bfloat16) == [
        "[megatron_s3] there was saved with exp_avg in torch.bfloat16; "
        "it is loaded as torch.float32"
    ]


@on_ranks()
@pytest.mark.parametrize(
    ("now", "then"),
    [
        ({"optimizer": "adam"}, {"optimizer": "sgd"}),
        # Not registered here: its package is not installed any more.
        ({"optimizer": "adam"}, {"optimizer": "ademamix"}),
        ({"optimizer": "s3"}, {"optimizer": "ademamix"}),
        ({"optimizer": "muon"}, {"optimizer": "adam"}),
        ({"muon_scalar_optimizer": "adam"}, {"muon_scalar_optimizer": "ademamix"}),
        ({"muon_scalar_optimizer": "s3"}, {"muon_scalar_optimizer": "adam"}),
    ],
)
def test_the_state_of_another_optimizer_is_refused_whoever_made_it(now, then):
    from megatron_s3.mcore.checkpoint.differences import compare_optimizers

    of_muon = {"optimizer": "muon", "muon_scalar_optimizer": "adam"}
    (name,) = now
    flag = f"--{name.replace('_', '-')}"
    said = f"there was saved by {flag} {then[name]}, whose state means nothing to {flag} "
    with pytest.raises(ValueError, match=said + now[name]):
        compare_optimizers("there", Namespace(**of_muon | now), Namespace(**of_muon | then))


@on_ranks()
@pytest.mark.parametrize("name", ["adam", "muon", "dist_muon", "lion", "soap"])
def test_megatrons_own_optimizers_resume(name):
    """Megatron's name for the distributed one differs; a version number is the plugin's alone."""
    from megatron_s3.mcore.checkpoint.differences import compare_optimizers
    from megatron_s3.optimizers.description import FORMAT

    saved = Namespace(optimizer=name, s3_format=FORMAT + (name != "lion"))
    compare_optimizers("there", Namespace(optimizer=name.removeprefix("dist_")), saved)


@on_ranks()
@pytest.mark.parametrize(
    ("now", "then", "remedy"),
    [
        (1, 2, "Use a size above 1, or load the model's weights alone with --no-load-optim"),
        (2, 1, "Use the size 1, or load the model's weights alone with --no-load-optim"),
        (2, 4, None),
        (1, 1, None),
    ],
)
def test_the_optimizer_of_experts_is_loaded_where_there_is_one(now, then, remedy, tmp_path):
    from megatron_s3.mcore.checkpoint import loading

    load = write(tmp_path, 3, tracker="3")
    of_experts = {"optimizer": "adam", "num_experts": 4, **RATES}
    saved = Namespace(expert_model_parallel_size=then, ckpt_format="torch_dist", **of_experts)

    def loaded(**other):
        args = flags(expert_model_parallel_size=now, **of_experts | other)
        original = lambda load_dir, args, **kwargs: ({"args": saved}, "", False, None)
        loading.load_base_checkpoint(original, load, args, rank0=True)

    if remedy is not None:
        with pytest.raises(ValueError, match=f"was saved with --expert-.* {then}, .*{remedy}"):
            loaded(no_load_optim=False)
        loaded()
    else:
        loaded(no_load_optim=False)
