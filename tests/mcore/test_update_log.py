"""What the log of updates says of parameters that have a learning rate of their own."""

import math

import pytest
import torch

from tests.mcore.library import build, on_ranks, step


def mains(optimizer):
    """The optimizer's parameters of this rank, by what they are part of."""
    from megatron_s3.mcore import update_log

    (part,) = optimizer.chained_optimizers
    return [(own, model) for model, own in update_log._pairs(part)]


def measured(before, after):
    """RMS of the changes over that of the new parameters, over all ranks."""
    sums = torch.tensor(
        [
            sum((a - b).double().square().sum() for a, b in zip(after, before, strict=True)),
            sum(a.double().square().sum() for a in after),
        ],
        dtype=torch.float64,
    )
    torch.distributed.all_reduce(sums)
    return math.sqrt(sums[0] / sums[1])


def overrides_of(case):
    from megatron.core.optimizer import OptimizerConfig, ParamKey, get_mup_config_overrides

    if case == "mup":
        config = OptimizerConfig(optimizer="s3", lr=0.1, min_lr=0.01)
        return get_mup_config_overrides(config, 100.0, "s3")
    if case == "none":
        return {}
    asked = {
        "lr": {"lr": 1e-3},
        "lr_mult": {"lr_mult": 0.01},
        "scheduled": {"max_lr": 1e-3, "min_lr": 1e-4},
        "beta": {"s3_beta": 0.5},
    }
    return {ParamKey(name="*1.weight"): asked[case]}


@pytest.mark.parametrize("case", ["none", "lr", "lr_mult", "scheduled", "mup", "beta"])
@on_ranks(2)
def test_the_weight_ratio_is_that_of_the_parameters(case):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    model, optimizer = build(
        overrides=overrides_of(case), min_lr=0.01, weight_decay=0.0, plugin_log_updates=True
    )
    scheduler = OptimizerParamScheduler(
        *(optimizer, 0.0, 0.1, 0.01, 2, 10, "linear", 0.0, 0.0, 10, "constant")
    )
    scheduler.step(2)
    for seed in range(2):
        pairs = mains(optimizer)
        before = [main.clone() for main, _ in pairs]
        assert step(model, optimizer, seed)[0]
        after = [main for main, _ in pairs]
        scheduler.step(4)  # as the trainer does before it logs
        log = optimizer.update_log.take()
        assert log["all"]["weight_ratio"] == pytest.approx(measured(before, after), rel=1e-4)
        for kind, ndim in (("other", 2), ("bias", 1)):
            ratio = measured(
                *([p for p, (_, m) in zip(ps, pairs, strict=True) if m.ndim == ndim]
                  for ps in (before, after))
            )  # fmt: skip
            assert log["kinds"][kind]["weight_ratio"] == pytest.approx(ratio, rel=1e-4)
        assert log["all"]["numel"] == 1850
        # The first update's size, whatever the rate, and with a group's own beta the larger.
        beta = 0.5 if case == "beta" else 0.95
        if seed == 0:
            first = (1 - beta**2) ** (2 / 3)
            assert log["all"]["max_abs"] == pytest.approx(first, rel=1e-5)


@on_ranks(1)
def test_an_interval_of_several_rates_is_their_mean():
    """With updates of one size in each step the mean square of the rates is what counts."""
    # Under its old name, which a program's configuration may have.
    model, optimizer = build("signsgd", weight_decay=0.0, s3_log_updates=True)
    squares = 0.0
    for rate in (0.3, 0.4):
        for group in optimizer.param_groups:
            group["lr"] = rate
        step(model, optimizer)
        squares += sum(main.double().square().sum().item() for main, _ in mains(optimizer))
    log = optimizer.update_log.take()["all"]
    assert log["rms"] == pytest.approx(1, rel=1e-6)
    right = math.sqrt((0.3**2 + 0.4**2) / 2) / math.sqrt(squares / (2 * 1850))
    assert log["weight_ratio"] == pytest.approx(right, rel=1e-6)
    assert optimizer.update_log.take()["all"]["weight_ratio"] == 0


@on_ranks(1)
def test_the_bound_is_that_of_every_group():
    from megatron.core.optimizer import ParamKey

    for asked, right in (({"s3_beta": 0.5}, 1.0), ({"bias_correction": True}, 1.0)):
        _, optimizer = build(overrides={ParamKey(name="*1.weight"): asked}, plugin_log_updates=True)
        assert optimizer.update_log.bound() == right
    _, optimizer = build(
        overrides={ParamKey(name="*1.weight"): {"beta2": 0.99}}, plugin_log_updates=True
    )
    assert optimizer.update_log.bound() > 1


@on_ranks(2)
def test_what_two_optimizer_instances_hold_is_counted_once():
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(num_distributed_optimizer_instances=2)
    model, optimizer = build(
        ddp={"num_distributed_optimizer_instances": 2}, plugin_log_updates=True, weight_decay=0.0
    )
    (part,) = optimizer.chained_optimizers
    assert part.distributed_optimizer_instance_id == torch.distributed.get_rank()
    assert step(model, optimizer)[0]
    log = optimizer.update_log.take()["all"]
    assert log["numel"] == 1850
    assert log["mean_abs"] == pytest.approx((1 - 0.95**2) ** (2 / 3), rel=1e-5)


CASES = ["precision-aware", "shared", "tensor", "context", "experts", "replicated experts"]


@pytest.mark.parametrize("case", CASES)
@on_ranks(2)
def test_what_several_ranks_update_alike_is_counted_once(case):
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2 if case == "tensor" else 1,
        context_parallel_size=2 if case == "context" else 1,
        expert_model_parallel_size=2 if case == "experts" else 1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
    numel, settings = 1850, {"sharded": False}
    if case == "precision-aware":
        settings = {"use_precision_aware_optimizer": True}
    elif case == "shared":  # tied between pipeline stages: another one counts it
        module[1].weight.shared, numel = True, 1850 - 600
    elif case == "experts":  # each rank has its own
        module[1].weight.allreduce, numel = False, 1850 + 600
    elif case == "replicated experts":
        module[1].weight.allreduce = False
    model, optimizer = build(model=module, plugin_log_updates=True, weight_decay=0.0, **settings)
    assert step(model, optimizer)[0]
    log = optimizer.update_log.take()["all"]
    assert log["numel"] == numel
    assert log["mean_abs"] == pytest.approx((1 - 0.95**2) ** (2 / 3), rel=1e-5)


@on_ranks(1)
def test_parameters_are_of_the_layer_that_they_are_in():
    """Which modules count from 1, in the whole model; the model's other parameters are of none."""
    layer = torch.nn.Sequential(torch.nn.Linear(30, 20))
    layer[0].layer_number = 1
    model, optimizer = build(
        model=torch.nn.Sequential(torch.nn.Linear(40, 30), layer), plugin_log_updates=True
    )
    step(model, optimizer)
    log = optimizer.update_log.take()
    assert {number: its["numel"] for number, its in log["layers"].items()} == {"0": 620}
    assert log["all"]["numel"] == 1850
