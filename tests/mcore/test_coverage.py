"""What is announced is what steps: every trainable parameter once, however it is built."""

import contextlib
import copy
import io
import math
from types import SimpleNamespace

import pytest
import torch

from tests.harness.releases import RELEASES
from tests.mcore.library import build, globally, on_ranks, step, wrap


def configured(**settings):
    from megatron.core.optimizer import OptimizerConfig

    config = OptimizerConfig(
        optimizer="s3",
        lr=0.1,
        clip_grad=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
    )
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def mimo_model():
    """A MimoModel of a language model alone, on a grid of one rank."""
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo import MimoModel

    grid = HyperCommGrid([1] * 4, ["tp", "cp", "dp", "pp"], backend="gloo")
    names = ["expt_tp", "ep", "expt_dp", "pp"]
    grid.register_view("expert", shape=[1] * 4, dim_names=names, shared_dims=["pp"])
    for dim in ("dp", ["dp", "cp"], "tp", "pp", ["tp", "pp"], ["tp", "cp", "dp", "pp"]):
        grid.create_pg(dim)
    for dim in (["expt_tp", "ep", "pp"], "expt_dp"):
        grid.create_pg(dim, view="expert")
    mimo = MimoModel.__new__(MimoModel)
    torch.nn.Module.__init__(mimo)
    mimo.mimo_config = SimpleNamespace(module_to_grid_map={"language": grid})
    mimo.language_model = wrap()
    return mimo


def torch_optimizers(optimizer):
    chain = optimizer.module_infos["language"].optimizer
    return [part.optimizer for part in chain.chained_optimizers]


@pytest.mark.parametrize("clip_grad", [0.0, 0.01])
@on_ranks(1)
def test_a_model_of_several_optimizers_is_stepped_by_s3(clip_grad):
    from megatron.core.optimizer import get_megatron_optimizer

    mimo = mimo_model()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        optimizer = get_megatron_optimizer(configured(clip_grad=clip_grad), [mimo])
    assert "S3 (SoftSignSGD) with beta=0.95" in said.getvalue()
    assert "] 1,850 parameters of rank 0" in said.getvalue()
    alone, right = build("s3", clip_grad=clip_grad)
    for seed in range(3):
        success, norm, _ = step(mimo.language_model, optimizer, seed)
        _, right_norm, _ = step(alone, right, seed)
        assert success and norm > 0
        assert norm == pytest.approx(right_norm, rel=1e-6) or not clip_grad
    pairs = zip(mimo.language_model.parameters(), alone.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=2**-8 if clip_grad else 0, atol=0)
    (s3,) = torch_optimizers(optimizer)
    assert s3.description.name == "s3" and s3.param_groups[0]["step"] == 3
    other = get_megatron_optimizer(configured(), [mimo_model()])
    other.load_state_dict(optimizer.state_dict())
    assert torch_optimizers(other)[0].param_groups[0]["step"] == 3


@on_ranks(1)
def test_what_does_not_reach_such_a_model_is_an_error():
    from megatron.core.optimizer import ParamKey, get_megatron_optimizer

    with pytest.raises(ValueError, match=r"sets s3_beta=0.5, but Megatron built the optimizer of"):
        get_megatron_optimizer(configured(), [mimo_model()], {ParamKey(name="*"): {"beta": 0.5}})
    with pytest.raises(ValueError, match=r"sets max_lr=0.5, but Megatron built the optimizer of"):
        get_megatron_optimizer(configured(), [mimo_model()], {ParamKey(name="*"): {"max_lr": 0.5}})
    with pytest.raises(ValueError, match="does not know the parts of a MimoOpt"):
        get_megatron_optimizer(configured(plugin_log_updates=True), [mimo_model()])


@on_ranks(1)
def test_a_parameter_that_no_module_of_the_model_steps_is_an_error():
    from megatron.core.optimizer import get_megatron_optimizer

    mimo = mimo_model()
    mimo.projection = torch.nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"no optimizer was built for 2 of 6 .* projection.weight"):
        get_megatron_optimizer(configured(), [mimo])
    mimo.projection.requires_grad_(False)
    assert get_megatron_optimizer(configured(), [mimo]).module_infos


def through(builder, *chunks, **settings):
    """What the plugin makes of another builder than Megatron's."""
    from megatron_s3.mcore import build as plugin

    return plugin.get_megatron_optimizer(builder, configured(**settings), list(chunks))


@pytest.mark.parametrize("release", RELEASES)
@on_ranks(1)
def test_builders_around_megatrons(release):
    from megatron.core import optimizer as core

    from megatron_s3.mcore import state

    upstream = core.get_megatron_optimizer.__wrapped__
    model = wrap()

    def once(config, model_chunks):
        return upstream(config, model_chunks)

    def wrapped(config, model_chunks):  # one that finds the plugin's in Megatron's place
        config = copy.copy(config)
        config.optimizer = "s3"
        return core.get_megatron_optimizer(config, model_chunks)

    def twice(config, model_chunks):
        built = upstream(config, model_chunks), upstream(config, model_chunks)
        return core.ChainedOptimizer([p for b in built for p in b.chained_optimizers])

    def repeated(config, model_chunks):
        return core.ChainedOptimizer(upstream(config, model_chunks).chained_optimizers * 2)

    def thrown_away(config, model_chunks):
        upstream(config, model_chunks)
        return upstream(config, [wrap()])

    def own(config, model_chunks):
        built = upstream(config, [wrap()])
        built.chained_optimizers[0].optimizer = torch.optim.AdamW(model.parameters())
        return built

    def stub(config, model_chunks):
        built = upstream(config, model_chunks)
        built.chained_optimizers[0].optimizer = None
        built.chained_optimizers[0].is_stub_optimizer = True
        return built

    for builder in (once, wrapped):
        built = through(builder, model)
        assert state.running().optimizer() is built
        assert step(model, built)[0]
        (part,) = built.chained_optimizers
        assert part.optimizer.description.name == "s3"
    for builder, fault in (
        (twice, "several optimizers step 4 of 4 trainable"),
        (repeated, "a DistributedOptimizer was built that the ChainedOptimizer around it"),
        (thrown_away, "a DistributedOptimizer was built that the ChainedOptimizer around it"),
        (
            own,
            "built for 4 of 4 trainable parameters, the first module.module.0.weight",
        ),
        (stub, "no optimizer was built for 4 of 4"),
    ):
        with pytest.raises(ValueError, match=fault):
            through(builder, model)


@on_ranks(1)
def test_a_chunk_that_is_not_stepped_is_an_error():
    """Of a model in several chunks, as pipeline stages that take turns have."""
    from megatron.core import optimizer as core

    def first_alone(config, model_chunks):
        return core.get_megatron_optimizer.__wrapped__(config, model_chunks[:1])

    with pytest.raises(ValueError, match="no optimizer was built for 4 of 8"):
        through(first_alone, wrap(), wrap())


@on_ranks(1)
def test_what_was_built_is_collected_while_it_is_built_alone():
    """Whatever was collected before: nothing that has ended is added to, and kept in memory."""
    from megatron_s3.mcore.coverage import collected

    with collected() as outer:
        with collected() as ended:
            pass
        _, optimizer = build()
    assert [part.optimizer for part in outer] == optimizer.chained_optimizers
    assert not ended
    build()
    assert len(outer) == 1


@on_ranks(2)
def test_a_fault_of_one_rank_is_an_error_on_all():
    model = torch.nn.Sequential(torch.nn.Linear(40, 30))
    whole = wrap(model)

    def builder(config, model_chunks):
        from megatron.core import optimizer as core

        here = model_chunks if torch.distributed.get_rank() == 0 else [wrap()]
        return core.get_megatron_optimizer.__wrapped__(config, here)

    with pytest.raises(ValueError, match="no optimizer was built for 2 of 2"):
        through(builder, whole)


@on_ranks(1)
def test_a_model_that_is_frozen_has_nothing_to_step():
    model = torch.nn.Sequential(torch.nn.Linear(40, 30))
    model.requires_grad_(False)
    _, optimizer = build(model=model, sharded=False)
    assert not [g for part in optimizer.chained_optimizers for g in part.param_groups]
    assert optimizer._synchronize_steps() is None


# ---- what steps ----------------------------------------------------------------------------------


def steps_say(model, optimizer, *scales):
    """What each step says."""
    said = []
    for scale in scales:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            step(model, optimizer, scale=scale)
        said.append(log.getvalue())
    return said


@on_ranks(1)
def test_the_first_update_says_once_what_was_not_announced():
    """Which is not the first step, where that is skipped."""
    from megatron_s3.kernels import cpu

    of_the_rule = cpu.reason
    fp16 = {"dtype": torch.float16, "initial_loss_scale": 8.0, "hysteresis": 1}
    cpu.reason = lambda rule, operands, **values: (
        "no tensor fits" if operands else of_the_rule(rule, operands, **values)
    )
    said = steps_say(*build(**fp16), math.inf, 1.0, 1.0)
    line = "S3 (SoftSignSGD) is updated by torch operations (portable: no tensor fits)"
    assert [line in each for each in said] == [False, True, False]
    assert not any(steps_say(*build(plugin_no_fused=True), 1.0))
    cpu.reason = of_the_rule
    with contextlib.redirect_stdout(io.StringIO()) as log:
        built = build(s3_p=2.5)
    assert "torch operations on cpu (the C++ kernel has p = 1, 2 and 3, not 2.5)" in log.getvalue()
    assert not any(steps_say(*built, 1.0))


# ---- the gradient norm ---------------------------------------------------------------------------

KINDS = {
    "sharded": {},
    "sharded, bf16 gradients": {"ddp": {"grad_reduce_in_fp32": False}},
    "whole": {"sharded": False},
    "fp32": {"sharded": False, "dtype": torch.float32},
    "precision-aware": {"use_precision_aware_optimizer": True},
}


@pytest.mark.parametrize("release", RELEASES)
@on_ranks(1)
def test_the_norm_is_a_number_and_whoever_asks_is_told_it(release):
    for kind, settings in KINDS.items():
        model, optimizer = build(**settings, plugin_log_grad_norm=False)
        assert step(model, optimizer)[:2] == (True, 0.0), kind
        for scale in (1.0, math.nan):
            model.zero_grad_buffer()
            for param in model.parameters():
                param.main_grad.fill_(scale)
            model.finish_grad_sync()
            assert optimizer.prepare_grads() is False
            norm = optimizer.get_grad_norm()
            right = pytest.approx(math.sqrt(1850), rel=1e-5)
            assert isinstance(norm, float) and (math.isnan(norm) if scale != 1.0 else norm == right)
        # What a program that uses the library gets.
        logged, logging = build(**settings, plugin_log_grad_norm=None)
        other, clipping = build(**settings, clip_grad=1e9)
        norms = [step(logged, logging, 7)[1], step(other, clipping, 7)[1]]
        assert norms[0] == norms[1] > 40, kind
        assert math.isnan(step(logged, logging, 8, scale=math.nan)[1]), kind


@on_ranks(1)
def test_a_norm_that_was_asked_for_changes_no_step():
    results = []
    for asks in (False, True):
        model, optimizer = build(ddp={"grad_reduce_in_fp32": False})
        for seed in range(2):
            model.zero_grad_buffer()
            torch.manual_seed(seed)
            for param in model.parameters():
                param.main_grad.copy_(torch.randn(param.shape))
            if asks:
                optimizer.prepare_grads()
                assert optimizer.get_grad_norm() > 1
            assert optimizer.step()[0]
        results.append(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("optimizer", ["s3", "adam"])
@on_ranks(1)
def test_a_norm_that_was_not_computed_is_not_logged(optimizer):
    from megatron.training import global_vars

    from megatron_s3.mcore import telemetry

    args = SimpleNamespace(optimizer=optimizer, clip_grad=0.0, log_interval=2)
    global_vars._GLOBAL_ARGS = args
    logged = []

    def log(losses, total, lr, iteration, scale, report, skipped, grad_norm, *rest):
        logged.append(grad_norm)

    for settings in ({}, {"plugin_log_grad_norm": True}, {"clip_grad": 1.0}):
        vars(args).update(settings)
        telemetry.training_log(log, {}, {}, 0.1, 1, 1.0, False, 0, 2.5)
    assert logged == ([None, 2.5, 2.5] if optimizer == "s3" else [2.5] * 3)


@on_ranks(1)
def test_a_norm_that_the_configuration_alone_asks_for_is_logged():
    """No flag sets grad_norm_skip_threshold."""
    from megatron_s3.mcore import telemetry

    logged = []
    args = SimpleNamespace(optimizer="s3", clip_grad=0.0, log_interval=1)
    for threshold in (1e6, math.inf):
        kept = build(grad_norm_skip_threshold=threshold, plugin_log_grad_norm=False)
        with globally(args):
            log = lambda *given: logged.append(given[7])
            telemetry.training_log(log, {}, {}, 0.1, 1, 1.0, False, 0, 2.5)
    assert kept and logged == [2.5, None]
