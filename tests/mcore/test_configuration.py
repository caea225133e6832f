"""The plugin's fields of Megatron's OptimizerConfig, for programs that make one themselves."""

import copy
import dataclasses
import math
import pickle
import textwrap

import pytest
import torch
import yaml

from tests.harness import fresh
from tests.harness.hyperparameters import NEEDED
from tests.harness.releases import RELEASES
from tests.mcore.library import build, inner, on_ranks, step, wrap


def config(**fields):
    from megatron.core.optimizer import OptimizerConfig

    return OptimizerConfig(**{"optimizer": "s3", "lr": 0.1} | fields)


@pytest.mark.parametrize("release", RELEASES)
@on_ranks()
def test_every_hyperparameter_is_a_field_that_the_optimizer_is_given(release):
    """Every hyperparameter of every optimizer is set to another value than its default."""
    from megatron.core.optimizer import get_megatron_optimizer

    from megatron_s3.mcore.arguments.names import destination
    from megatron_s3.optimizers import OPTIMIZERS

    for name, cls in OPTIMIZERS.items():
        for h in cls.description.hyperparameters:
            value = not h.default if h.is_switch else 0.25 if h.low < 0.25 < h.high else 2.5
            needed = {f"{name}_{key}": other for key, other in NEEDED.get(h.name, {}).items()}
            made = config(optimizer=name, **needed, **{destination(cls.description, h): value})
            optimizer = get_megatron_optimizer(made, [wrap(dtype=torch.float32, sharded=False)])
            assert inner(optimizer).param_groups[0][h.name] == value, (name, h.name)


@on_ranks()
def test_what_is_not_given_has_the_optimizers_default():
    assert config().clip_grad == 0.0 and config(clip_grad=1.0).clip_grad == 1.0
    assert config(optimizer="adam").clip_grad == 1.0
    assert type(config().clip_grad) is type(config(optimizer="adam").clip_grad) is float
    assert config(s3_beta=None).s3_beta == 0.95
    assert config().weight_decay == 0.01
    assert config(optimizer="nadam", nadam_eps=1e-6).adam_eps == 1e-6  # read by muP's overrides
    assert config(optimizer="nadam", nadam_eps=1e-6, adam_eps=1e-5).adam_eps == 1e-5


@on_ranks()
def test_it_is_copied_pickled_printed_and_dumped_with_its_fields():
    made = config(s3_p=2.0)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), dataclasses.replace(made)):
        assert other == made and other.s3_p == 2.0
    assert made != config() and "s3_p=2.0" in repr(made)
    plain = {k: v for k, v in dataclasses.asdict(made).items() if isinstance(v, bool | float | str)}
    assert yaml.safe_load(yaml.safe_dump(plain))["s3_p"] == 2.0


@on_ranks()
def test_a_wrong_field_is_refused_where_the_configuration_is_made():
    with pytest.raises(TypeError, match="s3_bta"):
        config(s3_bta=0.5)
    with pytest.raises(TypeError, match="plugin_metrics"):  # the trainer's log
        config(plugin_metrics=True)
    with pytest.raises(ValueError, match=r"s3_beta must be in \[0, 1\), not 2.0"):
        config(s3_beta=2.0)
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"clip_grad must be at least 0, not {value}"):
            config(clip_grad=value)
        config(optimizer="adam", clip_grad=value)  # which Megatron accepts
    with pytest.raises(ValueError, match=r"s3_p=2.0 is a hyperparameter of the optimizer s3, and"):
        config(optimizer="adam", s3_p=2.0)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("s3_bta", 0.5, "s3_bta=0.5, which is no hyperparameter of S3.* Did you mean s3_beta"),
        ("s3_p", 0.5, "s3_p must be in"),
        ("nadam_eps", 1e-3, "nadam_eps=0.001 is a hyperparameter of the optimizer nadam"),
    ],
)
@pytest.mark.parametrize("muon", [False, True], ids=["s3", "s3 beside muon"])
@on_ranks()
def test_what_was_set_afterwards_is_checked_before_training(name, value, said, muon):
    """An instance takes any attribute."""
    from megatron.core.optimizer import get_megatron_optimizer

    made = config(optimizer="muon", muon_scalar_optimizer="s3") if muon else config()
    setattr(made, name, value)
    with pytest.raises(ValueError, match=said):
        get_megatron_optimizer(made, [wrap(dtype=torch.float32, sharded=False)])


@pytest.mark.parametrize(
    ("switch", "heeded"),
    [
        ("plugin_log_updates", {"s3"}),
        ("plugin_no_fused", {"s3", "s3 beside muon"}),
        ("plugin_no_verify_checkpoint", {"s3", "s3 beside muon", "muon", "adam"}),
    ],
)
@on_ranks()
def test_a_switch_that_does_nothing_is_refused(switch, heeded):
    for name, own in {
        "s3": {},
        "s3 beside muon": {"optimizer": "muon", "muon_scalar_optimizer": "s3"},
        "muon": {"optimizer": "muon"},
        "adam": {"optimizer": "adam"},
    }.items():
        assert not getattr(config(**own), switch)
        if name in heeded:
            assert getattr(config(**own, **{switch: True}), switch)
        else:
            with pytest.raises(ValueError, match=f"{switch} does nothing with optimizer='"):
                config(**own, **{switch: True})


@on_ranks()
def test_what_sharded_muon_is_refused_for_is_the_reason():
    """Megatron says itself that its Muon does not train in fp16."""
    from megatron_s3.mcore.arguments.checks import check_scalar
    from megatron_s3.optimizers import S3

    fields = {"muon_scalar_optimizer": "s3", "use_layer_wise_distributed_optimizer": True}
    for precision in ({"bf16": True}, {"fp16": True}):
        assert check_scalar(config(optimizer="muon", **fields, **precision), S3)
    with pytest.raises(ValueError, match="does not support models in fp32"):
        check_scalar(config(optimizer="muon", **fields), S3)


@pytest.mark.parametrize("release", RELEASES)
@on_ranks()
def test_precision_aware_needs_no_adam(release):
    """Megatron's own configuration refuses it; and a later precision is taken with its states."""
    made = config(
        use_precision_aware_optimizer=True,
        use_distributed_optimizer=True,
        exp_avg_dtype=torch.bfloat16,
        exp_avg_sq_dtype=torch.bfloat16,
    )
    assert made.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    model, optimizer = build(
        **{f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name in _AWARE}
    )
    assert step(model, optimizer)[0]
    assert {s["exp_avg"].dtype for s in inner(optimizer).state.values()} == {torch.bfloat16}
    with pytest.raises((AssertionError, RuntimeError)):
        config(optimizer="adam", use_precision_aware_optimizer=True, use_distributed_optimizer=True)


_AWARE = ("use_precision_aware_optimizer", "exp_avg_dtype", "exp_avg_sq_dtype")


def test_subclasses_made_before_and_after_have_the_fields():
    """One that puts its checks off, as Megatron-Bridge's does, one with a default_factory."""
    code = """
        import dataclasses
        import megatron_s3
        from megatron.core.optimizer.optimizer_config import OptimizerConfig

        @dataclasses.dataclass
        class Deferred(OptimizerConfig):
            tags: list = dataclasses.field(default_factory=list)
            note: str = "a"
            def __post_init__(self): pass
            def finalize(self): super().__post_init__()

        class Plain(Deferred):
            pass

        @dataclasses.dataclass(frozen=False, eq=False)
        class Deeper(Plain):
            hidden: int = dataclasses.field(default=3, repr=False)

        before = len(dataclasses.fields(Deeper))
        megatron_s3.register(device="cpu")
        megatron_s3.register()

        @dataclasses.dataclass
        class Later(OptimizerConfig):
            own: int = 1

        for cls in (Deferred, Deeper, Later):
            config = cls(optimizer="s3", s3_p=2.0)
            if hasattr(config, "finalize"):
                config.finalize()
            assert (config.s3_p, config.clip_grad) == (2.0, 0.0), config
        assert Deeper().tags == [] and Deeper().tags is not Deeper().tags
        assert "hidden" not in repr(Deeper()) and Deeper().hidden == 3
        assert "__eq__" not in vars(Deeper) and Later() == Later()
        assert len(dataclasses.fields(Deeper)) > before + 20
        names = [field.name for field in dataclasses.fields(Deeper)]
        assert len(names) == len(set(names))
        # What was positional still is.
        first = next(f.name for f in dataclasses.fields(OptimizerConfig) if not f.kw_only)
        assert getattr(OptimizerConfig(None), first) is None
    """
    done = fresh.run("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


@on_ranks()
def test_the_norm_is_not_finite_where_a_gradient_is_not():
    """A framework skips a step by it."""
    model, optimizer = build(plugin_log_grad_norm=None)
    assert math.isfinite(step(model, optimizer)[1])
    assert not math.isfinite(step(model, optimizer, scale=math.inf)[1])


def a_configuration():
    """As Megatron's, with a field of a name that the plugin has, too."""

    @dataclasses.dataclass
    class Config:
        optimizer: str = "adam"
        nadam_eps: float = 0.5
        lion_is_megatrons: bool = True
        clip_grad: float = 1.0
        weight_decay: float = 0.01
        adam_eps: float = 1e-8

    return Config


@on_ranks()
def test_fields_are_added_once_and_none_of_megatrons_is_replaced():
    from megatron_s3.mcore.configuration import add_fields, settle

    cls = a_configuration()

    class Plain(cls):
        note: str = "no field"

    before = [field.name for field in dataclasses.fields(cls)]
    add_fields(cls)
    fields, made = dataclasses.fields(cls), cls.__init__
    assert [field.name for field in fields if not field.kw_only] == before
    assert "s3_p" in cls.__annotations__ and cls(s3_p=2.0).s3_p == 2.0
    add_fields(cls)
    assert dataclasses.fields(cls) == fields and cls.__init__ is made
    assert "note" not in {field.name for field in dataclasses.fields(Plain)}
    config = cls("s3")
    settle(config)
    assert (config.nadam_eps, config.s3_p, config.clip_grad) == (0.5, 3.0, 0.0)


@on_ranks()
def test_what_the_trainer_makes_while_its_arguments_read_adam_is_the_optimizers():
    from argparse import Namespace

    from megatron_s3.mcore.arguments.mask import as_adam

    args = Namespace(optimizer="s3")
    with as_adam(args):
        made = config(optimizer=args.optimizer, s3_p=2.0)
        assert args.optimizer == "adam"
    assert (made.s3_p, made.clip_grad) == (2.0, 0.0)


@on_ranks()
def test_an_old_name_of_a_switch_is_no_wrong_hyperparameter():
    from megatron_s3.mcore.configuration import settle
    from megatron_s3.renamed import RENAMED

    made = config()
    for name in RENAMED:
        setattr(made, name, True)
    settle(made)


@pytest.mark.parametrize(
    ("aware", "recipe", "offloaded", "held"),
    [
        (True, None, False, True),
        (True, "delayed", False, True),
        (True, "tensorwise", False, False),
        (True, "tensorwise", True, True),
        (False, None, True, False),
    ],
)
@on_ranks()
def test_who_holds_the_main_parameters_is_settled_as_for_fused_adam(aware, recipe, offloaded, held):
    from argparse import Namespace

    from megatron_s3.mcore.configuration import settle_precision

    made = Namespace(
        use_precision_aware_optimizer=aware,
        fp8_recipe=recipe,
        optimizer_cpu_offload=offloaded,
        store_param_remainders=True,
    )
    settle_precision(made)
    assert made.use_precision_aware_optimizer_no_fp8_or_ds_fp8 is held
    assert made.store_param_remainders


@on_ranks()
def test_an_optimizer_without_hyperparameters_says_so():
    from argparse import Namespace

    from megatron_s3.mcore import configuration

    bare = Namespace(description=Namespace(name="bare", label="Bare", hyperparameters=()))
    configuration.OPTIMIZERS = {**configuration.OPTIMIZERS, "bare": bare}
    made = config()
    made.bare_beta = 0.5
    with pytest.raises(ValueError, match=r"no hyperparameter of Bare\. It has none\."):
        configuration.settle(made)
