"""Configurations and recipes of Megatron-Bridge with S3."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch

from tests.bridge.ranks import in_bridge

pytestmark = pytest.mark.slow


def config(**fields):
    from megatron_s3.bridge import S3OptimizerConfig

    return S3OptimizerConfig(**{"lr": 1e-3} | fields)


@in_bridge
def test_the_configuration_has_the_fields_and_defaults_of_s3():
    from megatron.bridge.training.config import OptimizerConfig

    from megatron_s3.mcore.configuration import hyperparameter_fields
    from megatron_s3.optimizers import S3

    made = config(s3_p=2.0)
    made.finalize()
    assert (made.optimizer, made.clip_grad, made.s3_p, made.s3_beta) == ("s3", 0.0, 2.0, 0.95)
    names = [field.name for field in dataclasses.fields(made)]
    assert {name for name, _, _ in hyperparameter_fields(S3)} <= set(names)
    bridges = [field.name for field in dataclasses.fields(OptimizerConfig)]
    assert names[: len(bridges)] == bridges and len(names) == len(set(names))
    assert isinstance(made, OptimizerConfig) and type(made)(0.5).lr == 0.5


@in_bridge
def test_it_is_copied_pickled_and_compared_with_its_fields():
    made = config(s3_p=2.0)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), dataclasses.replace(made)):
        assert other == made and other.s3_p == 2.0
    assert made != config() and "s3_p=2.0" in repr(made)


@in_bridge
def test_a_wrong_field_is_refused():
    with pytest.raises(TypeError, match="s3_bta"):
        config(s3_bta=0.5)
    for fields, said in (
        ({"s3_beta": 2.0}, r"s3_beta must be in \[0, 1\), not 2.0"),
        ({"optimizer": "adam"}, "S3OptimizerConfig has optimizer='adam', but it builds 's3' alone"),
    ):
        with pytest.raises(ValueError, match=said):
            config(**fields).finalize()
    with pytest.raises(ValueError, match="builds 's3' alone"):  # of who does not finalize it
        config(optimizer="adam").provide([])


@in_bridge
def test_precision_aware_needs_no_transformer_engine():
    made = config(
        use_precision_aware_optimizer=True,
        use_distributed_optimizer=True,
        exp_avg_dtype=torch.bfloat16,
    )
    made.finalize()
    assert made.use_precision_aware_optimizer and made.exp_avg_dtype == torch.bfloat16
    assert made.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    assert made.store_param_remainders


@in_bridge
def test_it_is_the_same_where_the_plugin_is_registered():
    import megatron_s3

    before = config(s3_p=2.0)
    megatron_s3.register()
    after = config(s3_p=2.0)
    for each in (before, after):
        each.finalize()
        assert (each.s3_p, each.clip_grad, each.optimizer) == (2.0, 0.0, "s3")
    before = type(before)(lr=1e-3, s3_p=2.0, adan_eps=1e-8)  # a field that registering made
    before.finalize()
    assert before == after


@in_bridge
def test_the_helper_sets_both_weight_decays():
    from megatron_s3.bridge import distributed_s3_with_cosine_annealing

    optimizer, scheduler = distributed_s3_with_cosine_annealing(
        weight_decay=0.02, max_lr=3e-3, s3_p=2.0
    )
    found = (optimizer.weight_decay, scheduler.start_weight_decay, scheduler.end_weight_decay)
    assert found == (0.02, 0.02, 0.02)
    assert (optimizer.lr, optimizer.min_lr, optimizer.s3_p) == (3e-3, pytest.approx(3e-4), 2.0)
    assert optimizer.bf16 and optimizer.use_distributed_optimizer and optimizer.clip_grad == 0
    scheduler.finalize()
    with pytest.raises(TypeError, match="s3_bta"):
        distributed_s3_with_cosine_annealing(s3_bta=0.5)


@in_bridge
def test_a_recipe_becomes_s3s_by_the_rules():
    from megatron_s3.bridge import S3OptimizerConfig, use_s3
    from tests.bridge.program import recipe

    made = recipe()
    made.optimizer.weight_decay, made.optimizer.adam_beta2 = 0.1, 0.98
    made.scheduler.lr_warmup_init = 1e-6
    before = copy.deepcopy(made)
    assert use_s3(made, s3_p=2.0) is made
    optimizer, scheduler = made.optimizer, made.scheduler
    assert type(optimizer) is S3OptimizerConfig and optimizer.s3_p == 2.0
    assert (optimizer.lr, optimizer.min_lr, optimizer.weight_decay) == (3e-3, 3e-4, 0.01)
    assert (scheduler.start_weight_decay, scheduler.end_weight_decay) == (0.0033, 0.0033)
    assert (scheduler.lr_warmup_init, optimizer.clip_grad) == (1e-5, 0.0)
    assert optimizer.adam_beta2 == S3OptimizerConfig().adam_beta2 != 0.98
    assert optimizer.use_distributed_optimizer and scheduler.lr_warmup_iters == 2
    for field in dataclasses.fields(before):
        if field.name not in ("optimizer", "scheduler", "model"):
            assert getattr(made, field.name) == getattr(before, field.name)
    made = recipe()
    use_s3(made, lr_factor=3)
    assert made.optimizer.lr * made.scheduler.end_weight_decay == pytest.approx(3e-4 * 0.033)
    assert made.optimizer.lr == 9e-4


@in_bridge
def test_an_override_provider_of_the_users_is_named():
    from megatron.bridge.training.config import OptimizerConfigOverrideProvider

    from megatron_s3.bridge import recipes
    from tests.bridge.program import recipe

    class Slower(OptimizerConfigOverrideProvider):
        pass

    lines: list[str] = []
    recipes.say = lines.append
    recipes.use_s3(recipe())
    assert any(line.startswith("optimizer.lr 0.0003 -> 0.003") for line in lines)
    assert not any("provider" in line for line in lines)
    made = recipe()
    made.optimizer_config_override_provider = provider = Slower()
    recipes.use_s3(made, lr_factor=3)
    assert lines[-1].startswith("optimizer_config_override_provider is a Slower: ")
    assert lines[-1].endswith(" by 3.")
    assert made.optimizer_config_override_provider is provider


@in_bridge
def test_what_s3_cannot_train_is_refused_and_nothing_is_changed():
    from megatron_s3.bridge import use_s3
    from tests.bridge.program import recipe

    class Provider:
        pass

    class MegatronMIMOProvider(Provider):
        pass

    for change, said in (
        (lambda c: setattr(c.optimizer, "optimizer", "muon"), "optimizer='muon': only Adam"),
        (lambda c: setattr(c.optimizer, "optimizer", "s3"), "optimizer='s3': only Adam"),
        (lambda c: setattr(c.optimizer, "lr", None), "no optimizer.lr"),
        (lambda c: setattr(c.optimizer, "decoupled_weight_decay", False), "a part of Adam's grad"),
        (lambda c: setattr(c, "optimizer", config(optimizer="adam")), "which builds an optimizer"),
        (lambda c: setattr(c, "model", MegatronMIMOProvider()), "MegatronMIMOProvider, whose"),
        (
            lambda c: vars(c.optimizer).update(
                use_precision_aware_optimizer=True,
                use_distributed_optimizer=True,
                main_params_dtype=torch.float16,
            ),
            "S3 cannot train this recipe: --main-params-dtype fp16 is not supported",
        ),
    ):
        made = recipe()
        change(made)
        optimizer, scheduler = made.optimizer, made.scheduler
        before = copy.deepcopy((optimizer, scheduler))
        with pytest.raises(ValueError, match=said):
            use_s3(made)
        assert made.optimizer is optimizer and made.scheduler is scheduler
        assert (optimizer, scheduler) == before
    for factor in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="not a positive number"):
            use_s3(recipe(), lr_factor=factor)
    made = recipe()
    with pytest.raises(ValueError, match=r"S3 cannot train this recipe: s3_p must be in \[1, inf"):
        use_s3(made, s3_p=0.5)
    with pytest.raises(TypeError, match="s3_bta"):
        use_s3(made, s3_bta=0.5)
    assert made.optimizer.optimizer == "adam" and made.optimizer.lr == 3e-4


@in_bridge
def test_the_callback_knows_the_spikes_of_earlier_launches(tmp_path):
    """From the lines up to the iteration of the checkpoint, NaN and updates among them."""
    from megatron_s3.mcore.run_metrics import _spikes
    from megatron_s3.telemetry.runlog import RunLog
    from megatron_s3.telemetry.spike_log import SpikeLog

    log, spikes = RunLog(tmp_path), SpikeLog()
    for i in range(1, 61):
        loss = math.nan if i == 50 else 9.0 if 45 < i < 53 else 4.0 - i / 100 + (i % 3) / 1000
        size = {"mean_abs": 0.1 * (1 + (i > 44)) + i / 1e4, "max_abs": math.inf}
        updates = {"all": size, "kinds": {"mlp": size}, "layers": {"0": size}}
        spikes.add(i, loss, updates)
        written = {"mean_abs": size["mean_abs"], "max_abs": "inf"}
        lines = {"all": written, "kinds": {"mlp": written}, "layers": {"0": written}}
        record = {"iteration": i, "loss": "nan" if i == 50 else loss, "updates": lines}
        log.write("train", record)
        if i == 51:
            so_far = spikes.state_dict()
    log.write("train", {"iteration": 61, "loss": None})
    assert spikes.count == 1 and so_far["detector"]["open"] is not None
    assert _spikes(tmp_path, 51) == so_far
    assert _spikes(tmp_path, 61) == spikes.state_dict()
    assert _spikes(tmp_path / "none", 61) is None


@in_bridge
def test_the_callback_refuses_what_it_cannot_log():
    from types import SimpleNamespace

    from megatron_s3.bridge import MetricsCallback
    from tests.bridge.program import recipe

    made = recipe(folder=None)
    state = SimpleNamespace(cfg=made, train_state=SimpleNamespace(step=0, consumed_train_samples=0))
    adam = SimpleNamespace(config=made.optimizer)
    context = SimpleNamespace(state=state, optimizer=adam, model=[])
    with pytest.raises(ValueError, match="no folder to write"):
        MetricsCallback().on_train_start(context)
    with pytest.raises(ValueError, match="this one is adam"):
        MetricsCallback("runs", updates=True).on_train_start(context)
