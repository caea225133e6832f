"""Parameters, states and buffers that were moved between steps: the bits of a run without that."""

import itertools
from argparse import Namespace

import numpy
import pytest
import torch

from tests.harness.releases import RELEASES
from tests.mcore.library import build, equal, inner, on_ranks, states, step

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HOW = {
    "whole": {"sharded": False},
    "sharded": {},
    "aware": {"use_precision_aware_optimizer": True, "store_param_remainders": False},
    "aware, remainders": {"use_precision_aware_optimizer": True},
    "aware, not fused": {"use_precision_aware_optimizer": True, "plugin_no_fused": True},
    "aware, offloaded": {
        "use_precision_aware_optimizer": True,
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.5,
    },
}


def built(dtype="bf16", how="aware", **more):
    return build(dtype=DTYPES[dtype], loss_scale=1.0, **(HOW[how] | more))


def read(model):
    return [param.detach().clone() for param in model.parameters()]


def away_and_back(optimizer):
    """As where there is a GPU: upstream's methods give every tensor that they move new memory."""
    torch.Tensor.cuda = lambda tensor: tensor.clone()  # in a forked rank
    optimizer.offload_to_cpu()
    optimizer.restore_from_cpu()


@pytest.mark.parametrize("release", RELEASES)
@on_ranks(2)
def test_the_same_bits_with_states_moved_away_and_back(release):
    for how, dtype in itertools.product(HOW, DTYPES):
        (plain, its), (moved, other) = built(dtype, how), built(dtype, how)
        for i in range(5):
            if i in (0, 2, 3):
                old = states(other)
                away_and_back(other)
                if how != "aware, offloaded":
                    assert not {id(state) for state in old} & {id(s) for s in states(other)}
            before = read(moved)
            assert step(plain, its, i)[0] and step(moved, other, i)[0]
            assert not any(map(torch.equal, before, read(moved))), (how, dtype, i)
            assert equal(read(plain), read(moved)), (how, dtype, i)


@on_ranks(1)
def test_what_the_cpu_keeps_stays_there():
    model, optimizer = built(how="aware, offloaded")
    step(model, optimizer)
    kept = inner(optimizer).host.offload.params
    before = {id(t) for p in kept for t in inner(optimizer).state[p].values()}
    away_and_back(optimizer)
    after = {id(t) for p in kept for t in inner(optimizer).state[p].values()}
    assert kept and before == after


@on_ranks(1)
def test_a_shard_that_was_moved_is_the_models_memory_again():
    """Or a second copy of the model would stay on the device."""
    for dtype in DTYPES:
        model, optimizer = built(dtype)
        step(model, optimizer)
        away_and_back(optimizer)
        step(model, optimizer, 1)
        model_memory = {param.untyped_storage()._cdata for param in model.parameters()}
        params = [param for group in inner(optimizer).param_groups for param in group["params"]]
        assert {param.untyped_storage()._cdata for param in params} == model_memory


@on_ranks(1)
def test_model_weights_that_were_loaded_meanwhile_are_kept():
    """By way of reload_model_params, as after loading a model alone."""
    for how, dtype in itertools.product(HOW, DTYPES):
        results = []
        for moved in (False, True):
            model, optimizer = built(dtype, how)
            step(model, optimizer)
            if moved:
                away_and_back(optimizer)
            with torch.no_grad():
                for param in model.parameters():
                    param.copy_(torch.linspace(-1, 1, param.numel()).view(param.shape))
            optimizer.reload_model_params()
            step(model, optimizer, 1)
            results.append(read(model))
        assert equal(*results), (how, dtype)


@on_ranks(1)
def test_buffers_given_up():
    """A step on them is refused before it changes anything; restored, it is as if nothing was."""
    for how, dtype in itertools.product(HOW, DTYPES):
        (plain, its), (moved, other) = built(dtype, how), built(dtype, how)
        step(plain, its), step(moved, other)
        saved = [group["step"] for group in inner(other).param_groups]
        before = read(moved)
        if moved.buffers[0].param_data is None:  # the model's own memory
            memory = list(moved.parameters())
        else:
            memory = [buffer.param_data for buffer in moved.buffers]
        sizes = [tensor.untyped_storage().nbytes() for tensor in memory]
        contents = [tensor.detach().clone() for tensor in memory]
        for tensor in memory:
            tensor.untyped_storage().resize_(0)
        hold = [torch.full_like(tensor, 7) for tensor in contents]  # where they were, maybe
        if dtype != "fp32" or how != "whole":  # Megatron's class, whose parameters are the model's
            with pytest.raises(RuntimeError, match=r"have no memory now.*\(reload_from_cpu\)"):
                step(moved, other, 1)
        assert all(bool((tensor == 7).all()) for tensor in hold)
        for tensor, size, content in zip(memory, sizes, contents, strict=True):
            tensor.untyped_storage().resize_(size)
            tensor.data.copy_(content)
        assert equal(read(moved), before)
        assert [group["step"] for group in inner(other).param_groups] == saved
        step(plain, its, 1), step(moved, other, 1)
        assert equal(read(plain), read(moved)), (how, dtype)


@on_ranks(1)
def test_gradients_given_up():
    for how, dtype in itertools.product(HOW, ("bf16", "fp16")):
        model, optimizer = built(dtype, how)
        step(model, optimizer)
        before = read(model)
        model.offload_grad_buffers(synchronize=False, empty_cache=False)
        with pytest.raises(RuntimeError, match=r"gradients of shape .* have no memory now"):
            optimizer.step()
        assert equal(read(model), before)
        model.restore_grad_buffers(synchronize=False)
        step(model, optimizer, 1)
        assert not any(map(torch.equal, read(model), before)), (how, dtype)


@on_ranks(2)
def test_a_model_that_left_its_buffers():
    """No update would reach it: Megatron writes to the buffers, and gathers them."""
    for how, dtype in itertools.product(HOW, DTYPES):
        if how == "whole" and dtype == "fp32":
            continue  # the optimizer's parameters are the model's
        (plain, its), (moved, other) = built(dtype, how), built(dtype, how)
        step(plain, its), step(moved, other)
        for param in moved.parameters():
            param.data = param.data.clone()
        before = read(moved)
        if how != "whole":
            with pytest.raises(
                RuntimeError, match=r"is no longer in the buffer .* No parameter was"
            ):
                step(moved, other, 1)
            assert equal(read(moved), before)
        else:
            step(plain, its, 1), step(moved, other, 1)
            assert equal(read(plain), read(moved))


@on_ranks(1)
def test_one_parameter_that_was_moved_is_followed():
    """Whichever group it is in."""
    from megatron.core.optimizer import ParamKey

    overrides = {ParamKey(name="*1.*"): {"beta": 0.5}}
    for index in range(4):
        (plain, its), (moved, other) = (built(how="whole", overrides=overrides) for _ in "12")
        assert len(inner(other).param_groups) > 1
        step(plain, its), step(moved, other)
        param = list(moved.parameters())[index]
        param.data = param.data.clone()
        step(plain, its, 1), step(moved, other, 1)
        assert equal(read(plain), read(moved)), index


@on_ranks(1)
def test_an_address_that_is_anothers_by_now():
    from megatron_s3.mcore.one_pass import place, require_memory

    memory = numpy.zeros(8, dtype=numpy.float32)
    one, other = torch.from_numpy(memory), torch.from_numpy(memory)
    assert one.data_ptr() == other.data_ptr() and place(one) != place(other)
    whole = torch.zeros(8)
    part = whole[2:]
    before = place(part)
    assert before == place(part.detach()) != place(part[1:])
    whole.untyped_storage().resize_(0)
    assert place(part) != before
    whole.untyped_storage().resize_(part.nbytes)  # enough for it, and not where it is
    with pytest.raises(RuntimeError, match="have no memory now"):
        require_memory(part, "parameters", "reload_from_cpu")
    require_memory(part[6:], "parameters", "reload_from_cpu")  # of which it needs none


@on_ranks(1)
def test_an_address_that_has_less_memory_by_now():
    """An allocator may give it to a storage that was given up and is smaller."""
    from megatron_s3.mcore.one_pass import place

    def at_one_address(size):
        storage = Namespace(_cdata=1, nbytes=lambda: size)
        return Namespace(untyped_storage=lambda: storage, data_ptr=lambda: 4096)

    assert place(at_one_address(8)) == place(at_one_address(8)) != place(at_one_address(4))


@on_ranks(1)
def test_a_captured_step_is_not_moved():
    _, optimizer = built()
    optimizer.config.optimizer_cuda_graph = True
    with pytest.raises(RuntimeError, match="CUDA graph of optimizer_cuda_graph keeps writing"):
        optimizer.offload_to_cpu()


def norm(model):
    utils = pytest.importorskip("megatron.training.utils.common_utils")
    utils.get_args = lambda: Namespace(bf16=True, use_megatron_fsdp=False)
    return utils.calc_params_l2_norm(model)


@pytest.mark.parametrize("release", RELEASES[1:])
@on_ranks(2)
def test_the_norm_where_main_parameters_are_remainders(release):
    """That of the bf16 parameters, since no tensor holds the main ones."""
    model, optimizer = built(how="aware, remainders")
    for i in range(2):
        whole = torch.cat([param.detach().float().view(-1) for param in model.parameters()])
        assert norm(model) == pytest.approx(whole.norm().item(), rel=1e-6)
        assert step(model, optimizer, i)[0]


@pytest.mark.parametrize("release", RELEASES[1:])
@on_ranks(2)
def test_the_norm_of_all_parameters(release):
    """What upstream asks main_param for: before a step, after it, moved, loaded."""
    models = {how: built(how=how) for how in ("sharded", "aware", "aware, offloaded")}

    def check():
        norms = {how: norm(model) for how, (model, _) in models.items()}
        assert norms["sharded"] > 3
        assert norms == pytest.approx(dict.fromkeys(norms, norms["sharded"]), rel=1e-6), norms

    check()
    for i in range(2):
        for model, optimizer in models.values():
            step(model, optimizer, i)
        check()
    for _, optimizer in models.values():
        away_and_back(optimizer)
    check()
    for model, optimizer in models.values():
        step(model, optimizer, 2)
        for param in model.parameters():
            param.data.mul_(2)
        optimizer.reload_model_params()
    check()
    model, optimizer = models["aware"]
    owned = [p.main_param for p in model.parameters() if p.main_param is not None]
    masters = [state["master_param"] for state in inner(optimizer).state.values()]
    assert {id(tensor) for tensor in owned} == {id(tensor) for tensor in masters}


def named(model, optimizer) -> bool:
    """Whether the main parameters that Megatron finds are the optimizer's, and not copies."""
    masters = [state["master_param"] for state in inner(optimizer).state.values()]
    return {id(p.main_param) for p in model.parameters()} == set(map(id, masters))


@on_ranks(1)
def test_main_parameters_are_found_where_they_are_by_now():
    """Else what was moved away would stay on the device, and what was loaded would be missed."""
    model, optimizer = built()
    step(model, optimizer)
    other_model, other = built()
    (part,), (other_part,) = optimizer.chained_optimizers, other.chained_optimizers
    other_part.load_state_dict(part.state_dict())
    assert named(model, optimizer) and named(other_model, other)
    old = states(optimizer)
    torch.Tensor.cpu = torch.Tensor.cuda = lambda tensor: tensor.clone()
    torch.Tensor.is_cuda = property(lambda tensor: True)
    optimizer.offload_to_cpu()
    del torch.Tensor.is_cuda
    away = states(optimizer)
    assert named(model, optimizer) and not set(map(id, old)) & set(map(id, away))
    optimizer.restore_from_cpu()
    back = states(optimizer)
    assert named(model, optimizer) and not set(map(id, away)) & set(map(id, back))


@on_ranks(1)
def test_weights_that_are_taken_over_make_the_main_parameters_and_leave_the_rest():
    """Before a step, with the optimizer's settings as they were, and nothing held twice."""
    model, optimizer = built()
    (part,) = optimizer.chained_optimizers
    names = ("shard_fp32_from_float16_groups", "shard_fp32_groups")
    kept = [getattr(part, name) for name in names]
    with torch.no_grad():
        next(model.parameters()).fill_(3.0)
    optimizer.reload_model_params()
    assert named(model, optimizer) and bool((next(model.parameters()).main_param == 3.0).all())
    assert all(getattr(part, name) is old for name, old in zip(names, kept, strict=True))


class Mixed(torch.nn.Module):
    """A layer in half precision, and one parameter that stays in fp32."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(40, 30)
        self.scale = torch.nn.Parameter(torch.full((300,), 2.0))

    def bfloat16(self):
        self.linear.bfloat16()
        return self


@pytest.mark.parametrize("release", RELEASES[1:])
@on_ranks(2)
def test_the_norm_is_right_for_parameters_of_one_rank_and_in_fp32(release):
    for model in (lambda: torch.nn.Linear(3, 2, bias=False), Mixed):
        norms = []
        for how in ("sharded", "aware"):
            torch.manual_seed(0)
            trained, optimizer = built(how=how, model=model())
            norms.append([norm(trained), step(trained, optimizer) and norm(trained)])
        assert norms[0] == pytest.approx(norms[1], rel=1e-6), (norms, model)
        assert norms[0][0] != norms[0][1]


REFUSED = {
    # what the error says: settings of build().
    "--optimizer-cpu-offload needs --use-precision-aware-optimizer": {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 1.0,
    },
    "--optimizer-offload-fraction 0.0 must be in": HOW["aware, offloaded"]
    | {"optimizer_offload_fraction": 0.0},
    "--use-precision-aware-optimizer needs --use-distributed-optimizer": HOW["aware"]
    | {"sharded": False},
    "fp8-param-gather with --use-precision-aware-optimizer": HOW["aware"]
    | {"ddp": {"fp8_param_gather": True}},
    "--exp-avg-dtype bf16 is a flag of --use-precision-aware-optimizer": {
        "exp_avg_dtype": torch.bfloat16
    },
    "--main-params-dtype fp16 is not supported": HOW["aware"]
    | {"main_params_dtype": torch.float16},
    "does not support --optimizer-cuda-graph here: with --plugin-no-fused": {
        "optimizer_cuda_graph": True,
        "plugin_no_fused": True,
    },
}


@on_ranks(1)
def test_refused_at_construction():
    """As from the command line; else it would train, wrongly or not at all."""
    for (reason, settings), dtype in itertools.product(REFUSED.items(), DTYPES.values()):
        with pytest.raises(ValueError, match=reason):
            build(dtype=dtype, loss_scale=1.0, **settings)
