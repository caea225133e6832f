"""Loops of RL frameworks over the optimizer's state: their own functions on a real S3.

Ray, vLLM and what else their modules import is not installed; each function is taken out of its
module, and finds Megatron's classes and stand-ins for the calls that need a GPU.
"""

import contextlib
import dataclasses
import types

import pytest
import torch

from tests.harness.wheels import functions, source
from tests.mcore.library import build, equal, inner, on_ranks, states, step, wrap

NAMES = ("offload_megatron_optimizer", "load_megatron_optimizer")
NAMES += ("offload_megatron_copy_params", "load_megatron_copy_params")
LOOPS = {
    "verl": ("verl", "0.9.1", "verl/utils/megatron_utils.py"),
    "ms-swift": ("ms-swift", "4.6.0", "swift/megatron/trainers/utils.py"),
}
HOW = {
    "sharded": {},
    "whole": {"sharded": False},
    "precision-aware": {"use_precision_aware_optimizer": True},
    "offloaded by half": {
        "use_precision_aware_optimizer": True,
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.5,
    },
}


@contextlib.contextmanager
def moves():
    """Each Tensor.to inside gives new memory, as between devices; yields ids of what it moved."""
    moved, to = [], torch.Tensor.to

    def copying(tensor, *args, **kwargs):
        if not any(isinstance(arg, torch.dtype) for arg in args) and "dtype" not in kwargs:
            moved.append(id(tensor))
            return tensor.clone()
        return to(tensor, *args, **kwargs)

    torch.Tensor.to = copying
    try:
        yield moved
    finally:
        torch.Tensor.to = to


@pytest.fixture(params=LOOPS)
def text(request) -> str:
    return source(*LOOPS[request.param])


@pytest.mark.parametrize("how", HOW)
@on_ranks(1)
def test_the_whole_state_is_moved_away_and_back_and_the_bits_stay(text, how):
    from megatron.core.optimizer import ChainedOptimizer

    device = types.SimpleNamespace(empty_cache=lambda: None)
    found = functions(
        text,
        *NAMES,
        torch=torch,
        gc=types.SimpleNamespace(collect=lambda: None),
        ChainedOptimizer=ChainedOptimizer,
        get_device_id=lambda: "cpu",
        get_current_device=lambda: "cpu",
        get_torch_device=lambda: device,
        empty_cache=lambda: None,
        get_global_memory_buffer=lambda: types.SimpleNamespace(buffer={}),
    )
    (model, optimizer), (plain, right) = build(**HOW[how]), build(**HOW[how])
    for seed in range(4):
        if seed in (1, 2):
            for name in ("offload_megatron_optimizer", "load_megatron_optimizer"):
                before = set(map(id, states(optimizer)))
                with moves() as moved:
                    found[name](optimizer)
                assert before <= set(moved), name
        assert step(model, optimizer, seed)[0] and step(plain, right, seed)[0]
        assert equal(model.parameters(), plain.parameters())
        assert equal(states(optimizer), states(right))


class Settings(dict):
    """verl's configuration: keys that are attributes too."""

    __getattr__ = dict.__getitem__


@pytest.fixture
def verls_config() -> str:
    return source("verl", "0.9.1", "verl/utils/megatron/optimizer.py")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@on_ranks(1)
def test_verl_makes_the_configuration(verls_config, precision):
    """fp16 asks for precision-aware states; a misspelled hyperparameter is an error."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    make = functions(
        verls_config,
        "init_megatron_optim_config",
        torch=torch,
        dataclasses=dataclasses,
        OptimizerConfig=OptimizerConfig,
        PrecisionType=None,
        _MUON_ALGORITHMS=("muon",),
        print_rank_0=lambda text: None,
    )["init_megatron_optim_config"]
    asked = Settings(optimizer="s3", lr=0.1, min_lr=0.0, clip_grad=0.0, weight_decay=0.0)
    asked["override_optimizer_config"] = {"s3_p": 2.0}
    flags = {"fp16": precision == "fp16", "bf16": precision == "bf16"}
    config = make(asked, **flags)
    assert (config.s3_p, config.clip_grad) == (2.0, 0.0)
    optimizer = get_megatron_optimizer(config, [wrap(dtype=dtypes[precision])])
    assert {group["p"] for group in inner(optimizer).param_groups} == {2.0}
    asked["override_optimizer_config"] = {"s3_pp": 2.0}
    with pytest.raises(TypeError, match="s3_pp"):
        make(asked, **flags)


@on_ranks(1)
def test_a_state_that_was_moved_by_its_own_method_goes_on():
    (model, optimizer), (plain, right) = build(), build()
    for seed in range(3):
        before = set(map(id, states(optimizer)))
        if before:
            with moves() as moved:
                inner(optimizer).move_state("cpu")
            assert before == set(moved)
            inner(optimizer).move_state()
        step(model, optimizer, seed)
        step(plain, right, seed)
        assert equal(model.parameters(), plain.parameters())


@pytest.mark.parametrize("how", HOW)
@on_ranks(1)
def test_a_state_that_was_reset_is_a_new_one(how):
    model, optimizer = build(**HOW[how])
    for seed in range(3):
        step(model, optimizer, seed)
    masters = [
        s["master_param"].clone() for s in inner(optimizer).state.values() if "master_param" in s
    ]
    inner(optimizer).reset_state()
    found = list(inner(optimizer).state.values())
    assert all(not state[name].any() for state in found for name in ("exp_avg", "exp_pnorm"))
    assert {group["step"] for group in inner(optimizer).param_groups} == {0}
    assert equal(masters, [state["master_param"] for state in found if "master_param" in state])
    assert step(model, optimizer, 4)[0]
