"""What is saved of sharded state is what the ranks hold: paddings, buckets, ranks, formats."""

import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_s3.mcore.checkpoint import shards
from tests.harness.releases import INSTALLED, RELEASES
from tests.harness.trainer import brief, tensors
from tests.mcore.library import build, on_ranks

#: Of DistributedDataParallelConfig; without overlap everything is in one bucket.
LAYOUTS = {
    "one bucket": {},
    "small buckets": {"overlap_grad_reduce": True, "bucket_size": 600},
    "a bucket a parameter": {"overlap_grad_reduce": True, "bucket_size": 1},
    # To multiples of 65,536 elements: some ranks' shares are padding alone.
    "padded for bandwidth": {
        "overlap_grad_reduce": True,
        "bucket_size": 600,
        "pad_buckets_for_high_nccl_busbw": True,
    },
}
FORMATS = ("fully_reshardable", "fully_reshardable, gloo", "dp_reshardable", "torch")
STATES = {"s3": ("exp_avg", "exp_pnorm"), "adam": ("exp_avg", "exp_avg_sq")}


def model(experts: bool = False, shared: bool = False) -> torch.nn.Module:
    """Sizes that are no multiples of 64, so that there are gaps, and one of a few elements."""
    torch.manual_seed(0)
    made = torch.nn.Sequential(
        torch.nn.Linear(13, 21), torch.nn.Linear(21, 5), torch.nn.Linear(5, 40, bias=False)
    )
    for param in made[1].parameters():
        if experts:
            param.allreduce = False  # another buffer, of the expert-parallel ranks
    made[0].weight.shared_embedding = shared  # a bucket of its own
    return made


def make(name: str, layout: str, seed: int, *, release: str = INSTALLED, **kind: bool):
    """A model, its optimizer with random state, and main parameters that bf16 rounds away."""
    built, optimizer = build(name, model=model(**kind), ddp=LAYOUTS[layout])
    torch.manual_seed(100 * seed + torch.distributed.get_rank())
    with torch.no_grad():
        for part in optimizer.chained_optimizers:
            part.state_dict()  # makes the state, of torch's AdamW too
            part.optimizer.state_dict()
            for group in part.optimizer.param_groups:
                group["step"] = 3
                for param in group["params"]:
                    param.add_(1e-4 * torch.rand_like(param) * param.abs())
            for state in part.optimizer.state.values():
                for tensor in state.values():
                    if tensor.dim():
                        tensor.copy_(torch.rand_like(tensor))
    return built, optimizer


def held(built: torch.nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """Main parameters and states of all ranks, whole and flat, by ``state.parameter``."""
    names = {param: name for name, param in built.module.module.named_parameters()}
    mine = []
    for part in optimizer.chained_optimizers:
        for param in part.model_param_gbuf_map:
            place = part._get_model_param_range_map(param)["param"]
            for key, tensor in part._get_main_param_and_optimizer_states(param).items():
                if tensor.dim():
                    name = f"{key}.{names[param]}"
                    mine.append((name, place.start, tensor.detach().clone(), param.numel()))
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    found: dict[str, torch.Tensor] = {}
    for name, start, tensor, size in (each for rank in everyone for each in rank):
        whole = found.setdefault(name, torch.full((size,), torch.nan))
        whole[start : start + tensor.numel()] = tensor
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)}: {different}"


def sharded(built: torch.nn.Module) -> dict:
    """The model's part of a sharded state dict."""
    from megatron.core.dist_checkpointing import ShardedTensor

    replica = (0, 0, torch.distributed.get_rank())
    return {
        name: ShardedTensor.from_rank_offsets(name, param, replica_id=replica)
        for name, param in built.module.module.named_parameters()
    }


def metadata(form: str) -> dict:
    return {
        "distrib_optim_sharding_type": form.partition(",")[0],
        "distrib_optim_fully_reshardable_mem_efficient": form.endswith("gloo"),
    }


def save(built: torch.nn.Module, optimizer, form: str, folder: str) -> None:
    from megatron.core import dist_checkpointing

    if form == "torch":
        optimizer.save_parameter_state(f"{folder}/distrib_optim.pt")
        torch.distributed.barrier()
        return
    state = optimizer.sharded_state_dict(sharded(built), metadata=metadata(form))
    dist_checkpointing.save(state, folder)


def load(built: torch.nn.Module, optimizer, form: str, folder: str) -> None:
    from megatron.core import dist_checkpointing

    if form == "torch":
        optimizer.load_parameter_state(f"{folder}/distrib_optim.pt")
        return
    state = optimizer.sharded_state_dict(sharded(built), is_loading=True, metadata=metadata(form))
    optimizer.load_state_dict(dist_checkpointing.load(state, folder))


def shared_folder() -> str:
    shared = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(shared)
    return shared[0]


def remove(folder: str) -> None:
    torch.distributed.barrier()
    shutil.rmtree(folder, ignore_errors=True)


def check(name: str, layout: str, form: str, **kind: bool) -> None:
    """Saves and loads: what is in the file, and what arrives, is what the ranks hold."""
    built, optimizer = make(name, layout, 1, **kind)
    want = held(built, optimizer)
    keys = {name.partition(".")[0] for name in want}
    assert keys == {"param", *STATES[name]}
    folder = shared_folder()
    save(built, optimizer, form, folder)
    if form.startswith("fully_reshardable"):
        found = {
            name.partition("optimizer.state.")[2]: tensor.flatten()
            for name, tensor in tensors(Path(folder), None).items()
        }
        assert_equal(want, found)
    other_built, other = make(name, layout, 2, **kind)
    assert not torch.equal(held(other_built, other)["param.0.weight"], want["param.0.weight"])
    load(other_built, other, form, folder)
    assert_equal(want, held(other_built, other))
    assert shards.unlike_weights([other_built]) == []
    remove(folder)


PAIRS = [f"{name}, {layout}" for name in STATES for layout in LAYOUTS]


@pytest.mark.parametrize("release", brief(RELEASES, INSTALLED))
@pytest.mark.parametrize("pair", brief(PAIRS, "s3, small buckets", "adam, padded for bandwidth"))
@on_ranks(3)
def test_three_ranks_save_what_they_hold(pair, release):
    name, layout = pair.split(", ")
    for form in FORMATS:
        check(name, layout, form)


thorough = pytest.mark.thorough
RANKS = [3, *(pytest.param(ranks, marks=thorough) for ranks in (1, 2, 5, 8))]


@pytest.mark.parametrize("kind", ["experts", "shared"])
@pytest.mark.parametrize("name", brief(STATES, "s3"))
@pytest.mark.parametrize("layout", brief(LAYOUTS, "small buckets"))
@pytest.mark.parametrize("ranks", RANKS)
@on_ranks()
def test_other_buffers_and_a_bucket_of_one_parameter(ranks, layout, name, kind):
    """Experts have a buffer of their own; an embedding that stages share ends a bucket early."""
    for form in FORMATS:
        check(name, layout, form, **{kind: True})


@pytest.mark.parametrize("release", brief(RELEASES, INSTALLED))
@on_ranks(3)
def test_other_buckets_load_what_was_saved_reshardable(release):
    built, optimizer = make("s3", "padded for bandwidth", 1)
    want = held(built, optimizer)
    folder = shared_folder()
    save(built, optimizer, "fully_reshardable", folder)
    for layout in LAYOUTS:
        other_built, other = make("s3", layout, 2)
        load(other_built, other, "fully_reshardable", folder)
        assert_equal(want, held(other_built, other))
    remove(folder)


@on_ranks(2)
def test_gaps_between_parameters_are_zeros():
    """Megatron saves there what its memory holds: files of equal runs would differ."""
    built, optimizer = make("s3", "small buckets", 1)
    folder = shared_folder()
    save(built, optimizer, "dp_reshardable", folder)
    found = [t for name, t in tensors(Path(folder), None).items() if name.endswith(".exp_avg")]
    # Random numbers of state are hardly ever 0.
    gaps = sum(int((tensor == 0).sum()) for tensor in found)
    assert gaps == sum(map(torch.numel, found)) - sum(p.numel() for p in built.parameters()) > 0
    remove(folder)


@on_ranks(3)
def test_main_parameters_that_are_not_the_weights_are_noticed():
    """As Megatron up to 0.19.2 has saved them: cut where padding is counted."""
    from megatron.core import dist_checkpointing

    for name in ("s3", "adam"):
        built, optimizer = make(name, "small buckets", 1)
        folder = shared_folder()
        save(built, optimizer, "fully_reshardable", folder)
        template = optimizer.sharded_state_dict(
            sharded(built), is_loading=True, metadata=metadata("fully_reshardable")
        )
        loaded = dist_checkpointing.load(template, folder)
        weight = next(
            state["param"] for state in loaded["param_state"].values() if state["param"].dim() == 2
        )
        weight.copy_(weight.flatten().roll(3).reshape(weight.shape))
        optimizer.load_state_dict(loaded)
        unlike = [None] * 3
        torch.distributed.all_gather_object(unlike, shards.unlike_weights([built]))
        names = {n for n, p in built.named_parameters() if p.shape == weight.shape}
        assert {name for found in unlike for name in found} == names and len(names) == 1
        assert shards.unlike_weights([built]) == []  # said once
        remove(folder)


@on_ranks(3)
def test_a_reshardable_save_gathers_what_the_plan_says():
    from argparse import Namespace

    from megatron_s3.mcore.planning import memory

    args = Namespace(use_distributed_optimizer=True, ckpt_format="torch_dist")
    for layout in ("one bucket", "small buckets"):
        built, optimizer = make("s3", layout, 1)
        (part,) = optimizer.chained_optimizers
        gathered = part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
        (tensors_,) = gathered[0].values()
        found = sum(t.nbytes for t in tensors_.values() if isinstance(t, torch.Tensor))
        plan = memory.checkpoint(args, memory.measure([built], optimizer), "fully_reshardable")
        assert found == 12 * part.buffers[0].numel_unpadded
        assert plan.reading == 12 * sum(p.numel() for p in built.parameters())
        assert 0 <= found - plan.reading < 12 * 64 * len(list(built.parameters()))  # gaps
        bucket = max(bucket.grad_data.nbytes for bucket in part.buffers[0].buckets)
        assert plan.saving == plan.reading + 3 * bucket


@on_ranks(1)
def test_the_places_of_every_buffer_are_put_back():
    places = {"one": (0, 100, 0), "two": (128, 160, 1), "three": (192, 200, 2)}
    buckets = [
        Namespace(bucket_id=i, grad_data=torch.zeros(size), numel_unpadded=unpadded)
        for i, (size, unpadded) in enumerate(((128, 100), (64, 32), (64, 8)))
    ]
    buffers = [Namespace(buckets=buckets, param_index_map=places) for _ in range(2)]
    with shards._counted_without_padding(buffers):
        for buffer in buffers:
            found = buffer.param_index_map
            assert found == {"one": (0, 100, 0), "two": (100, 132, 0), "three": (132, 140, 0)}
    assert all(buffer.param_index_map is places for buffer in buffers)


@on_ranks(1)
def test_main_parameters_that_are_not_the_weights_are_noted():
    """More than half of the elements, by more than rounding to few bits explains."""
    from megatron_s3.mcore.state import running

    whole = torch.nn.Parameter(torch.tensor([9.0, 1.0, 2.0, 0.0, 4.0, 9.0]))
    model = torch.nn.Module()
    model.weight = whole
    place = {"param": Namespace(start=1, end=5)}  # this rank's
    optimizer = Namespace(_get_model_param_range_map=lambda param: place)

    def noted(*main: float, dtype: torch.dtype = torch.float32, param=whole) -> list[str]:
        shards.note_unlike(optimizer, param, {"param": torch.tensor(main).to(dtype)})
        found = shards.unlike_weights([model])
        assert running().unlike == []
        return found

    assert noted(1, 2, 0, 4) == noted(1.3, 1.6, 1e-7, 4.9) == []
    assert noted(5, 5, 0, 4) == []  # half of them
    assert noted(1e-7, 1e-7, 1e-7, 0, param=torch.nn.Parameter(torch.zeros(6))) == []
    assert noted(5, 5, 5, 4) == noted(1.4, 1.4, 1e-5, 4) == ["weight"]
    assert noted(5, 5, 5, 4, param=torch.nn.Parameter(whole.detach().clone())) == ["a parameter"]
    # What is compared otherwise, or by somebody else.
    assert noted(5, 5, 5) == noted(5, 5, 5, 4, dtype=torch.int8) == []
    shards.note_unlike(optimizer, whole, {"param": "of another kind"})
    assert shards.unlike_weights([model]) == []


@on_ranks(1)
def test_a_shard_that_is_a_gap_between_parameters_is_written_as_one():
    """Of more ranks than a bucket has multiples of 64 elements."""
    bucket = Namespace(grad_data=torch.zeros(128), numel_unpadded=100)
    group = Namespace(rank=lambda: 1, size=lambda: 4)
    buffers = [Namespace(buckets=[bucket], grad_data=bucket.grad_data)]
    optimizer = Namespace(data_parallel_group=group, buffers=buffers)
    state = shards.get_parameter_state_dp_reshardable(
        lambda optimizer: {0: {"bf16": [[]]}}, optimizer
    )
    ((gap,),) = state[0]["bf16"]
    expected = {"gbuf_local_start": 0, "gbuf_local_end": 32, "padding": True}
    assert {name: value for name, value in gap.items() if name in expected} == expected
    zeros = {name: value for name, value in gap.items() if name not in expected}
    assert zeros.keys() == {"param", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(value, torch.zeros(32)) for value in zeros.values())


@on_ranks(1)
def test_gaps_hold_what_parameters_hold_element_by_element():
    """And no step, which torch's AdamW has once for each parameter."""
    part = {"param": torch.ones(3), "exp_avg": torch.ones(3), "step": torch.tensor(7.0)}
    part |= {"gbuf_local_start": 2, "gbuf_local_end": 5}
    before, same, after = shards._without_gaps([part], 9, part)
    assert same is part and "step" not in before and "step" not in after
    assert [each["exp_avg"].tolist() for each in (before, after)] == [[0.0] * 2, [0.0] * 4]
    assert shards._without_gaps([part], 5, part)[-1] is part
