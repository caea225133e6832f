"""Megatron-FSDP's groups of parameters, each kind alone, and the names of states that it splits."""

import inspect
from argparse import Namespace

import pytest
import torch

from tests.mcore.library import on_ranks


class Buffer:
    """As much of a weight buffer of Megatron-FSDP as is asked, of one parameter."""

    def __init__(self, param, distributed: bool) -> None:
        self.data, self.param_idx = torch.zeros(10), {param: 3}
        self.is_data_distributed = distributed

    def get_item(self, index: int, only_shard: bool) -> torch.Tensor:
        assert index == 3
        return self.data[: 2 if only_shard else 4]


def made(models: bool | None, mains: bool | None = False, model: torch.Tensor | None = None):
    """The shell of an optimizer; whether buffers are distributed, None of one that is not there."""
    from megatron_s3.mcore.megatron_fsdp import ElementwiseFSDPOptimizer

    model = torch.nn.Parameter(torch.ones(2, 2)) if model is None else model
    main = torch.nn.Parameter(torch.ones(4))
    main.orig_param = model
    group = Namespace(
        params=[model],
        model_weight_buffer=None if models is None else Buffer(model, models),
        main_weight_buffer=None if mains is None else Buffer(model, mains),
    )
    held = Namespace(optimizer_named_parameters=[("of it", main)], parameter_groups=[group])
    optimizer = ElementwiseFSDPOptimizer.__new__(ElementwiseFSDPOptimizer)
    optimizer.model_chunks = [Namespace(param_and_grad_buffer=held)]
    return optimizer, main, model, group


@pytest.mark.parametrize("models", [False, True])
@pytest.mark.parametrize("mains", [False, True])
@on_ranks(1)
def test_the_memory_is_this_ranks_shard_where_a_buffer_is_distributed(models, mains):
    optimizer, main, _, group = made(models, mains)
    ((own, memory),) = optimizer._find_model_params().items()
    assert own is main and memory.numel() == (2 if models or mains else 4)
    assert memory.data_ptr() == group.model_weight_buffer.data.data_ptr()


@on_ranks(1)
def test_without_a_buffer_the_models_parameter_is_the_memory():
    optimizer, main, model, _ = made(None)
    ((own, memory),) = optimizer._find_model_params().items()
    assert own is main and memory.shape == (4,) and memory.data_ptr() == model.data_ptr()
    quantized = torch.nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    assert made(None, model=quantized)[0]._find_model_params() is None


@on_ranks(1)
def test_groups_whose_parameters_are_the_main_ones_are_left_alone():
    """Of a model in fp32."""
    optimizer, *_ = made(None, None)
    assert optimizer._find_model_params() == {} and optimizer._places() == ()


@on_ranks(1)
def test_memory_that_was_given_up_is_refused():
    optimizer, _, _, group = made(True)
    group.model_weight_buffer.data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"parameters of shape .* have no memory now"):
        optimizer._find_model_params()


@on_ranks(1)
def test_whatever_moves_is_noticed():
    def moved(optimizer, tensor) -> bool:
        before = optimizer._places()
        assert before == optimizer._places()
        tensor.data = tensor.data.clone()
        return before != optimizer._places()

    optimizer, main, model, group = made(True)
    assert moved(optimizer, main) and moved(optimizer, group.main_weight_buffer.data)
    assert moved(optimizer, group.model_weight_buffer.data) and not moved(optimizer, model)
    optimizer, _, model, _ = made(None)
    assert moved(optimizer, model)


def constants() -> set[tuple]:
    from megatron.core.transformer import fsdp_dtensor_checkpoint

    functions = filter(inspect.isfunction, vars(fsdp_dtensor_checkpoint).values())
    return {c for f in functions for c in f.__code__.co_consts if isinstance(c, tuple)}


@pytest.mark.parametrize("fails", [False, True])
@on_ranks(1)
def test_states_are_split_that_have_a_parameters_shape_and_names_are_put_back(fails):
    from megatron_s3.mcore.megatron_fsdp import ADAMS, preprocess_fsdp_dtensor_state_dict

    state = {"exp_avg": torch.ones(3), "exp_pnorm": torch.ones(3), "step": torch.tensor(7.0)}
    cases = [({"optimizer": {"state": {"w": state | {"kind": "s3"}}}}, ("exp_avg", "exp_pnorm"))]
    cases += [({"optimizer": None}, ADAMS), ({}, ADAMS), ({"optimizer": {"state": {}}}, ADAMS)]
    for raw, expected in cases:
        seen = []

        def original(*rest, seen=seen):
            seen.append(constants())
            if fails:
                raise KeyError("of Megatron")

        if fails:
            with pytest.raises(KeyError, match="of Megatron"):
                preprocess_fsdp_dtensor_state_dict(original, None, raw, None)
        else:
            preprocess_fsdp_dtensor_state_dict(original, None, raw, None)
        assert expected in seen[0] and (ADAMS in seen[0]) is (expected == ADAMS)
        assert ADAMS in constants() and ("exp_avg", "exp_pnorm") not in constants()
