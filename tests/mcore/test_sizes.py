"""What real ranks allocate is what the plan says, in several layouts."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.harness.models import TINY
from tests.mcore.library import on_ranks

pytestmark = pytest.mark.slow

# Sizes that leave gaps: no dimension is a multiple of 64 x ranks, and no bucket ends at one.
ODD = """--plugin-device cpu --train-iters 6 --hidden-size 40 --ffn-hidden-size 132
--num-attention-heads 2 --make-vocab-size-divisible-by 2 --vocab-size 201""".split()
BF16, SHARDED = ["--bf16"], ["--use-distributed-optimizer"]
BUCKETS = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "9000"]
TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
EP = ["--num-experts", "4", "--expert-model-parallel-size", "2"]
AWARE = [*BF16, *SHARDED, "--use-precision-aware-optimizer"]
BF16_STATES = ["--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"]
INT8_STATE = ["--exp-avg-dtype", "fp8", "--exp-avg-sq-dtype", "bf16"]
CASES = {
    4: [BF16 + SHARDED + TP, BF16 + SHARDED + PP, SHARDED + TP + PP],
    2: [
        [],
        BF16,
        SHARDED,
        BF16 + SHARDED,
        BF16 + SHARDED + BUCKETS,
        ["--fp16", *SHARDED],
        [*BF16, *SHARDED, "--grad-reduce-in-bf16"],
        [*BF16, "--grad-reduce-in-bf16"],
        BF16 + TP,
        BF16 + SHARDED + PP,
        [*BF16, *SHARDED, *PP, "--untie-embeddings-and-output-weights"],
        BF16 + SHARDED + EP,
        AWARE,
        [*AWARE, *BF16_STATES, *BUCKETS],
        [*AWARE, *BF16_STATES, "--main-grads-dtype", "bf16"],
        [*AWARE, "--exp-avg-sq-dtype", "bf16", *EP],
        [*AWARE, *INT8_STATE, "--main-grads-dtype", "bf16"],
    ],
    1: [[], BF16, ["--fp16"], BF16 + SHARDED],
}

#: Bytes a parameter that the optimizer updates, of main parameters, states and gradient copies.
BYTES = {
    "s3 --bf16 --use-distributed-optimizer": (4, 8, 0),
    "s3 --bf16 --use-distributed-optimizer --grad-reduce-in-bf16": (4, 8, 0),
    "s3 --bf16 --grad-reduce-in-bf16": (4, 8, 0),
    "adam --bf16 --grad-reduce-in-bf16": (4, 8, 4),
    f"s3 {' '.join(AWARE)}": (2, 8, 0),
    f"s3 {' '.join([*AWARE, *INT8_STATE])} --main-grads-dtype bf16": (2, 3, 0),
    f"s3 {' '.join([*AWARE, *BF16_STATES, *BUCKETS])}": (2, 4, 0),
    f"s3 {' '.join([*AWARE, *BF16_STATES])} --main-grads-dtype bf16": (2, 4, 0),
    f"s3 {' '.join([*AWARE, '--exp-avg-sq-dtype', 'bf16', *EP])}": (2, 6, 0),
}


class Allocations(TorchDispatchMode):
    """Every storage that an operation made: counts them in another way than the plan does."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = reference, storage.nbytes()
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


#: Layouts by their titles: ranks, optimizer and flags. Adam's precision-aware states are
#: Transformer Engine's.
LAYOUTS = {
    f"{ranks}: {' '.join([name, *flags])}": (ranks, name, flags)
    for ranks, cases in CASES.items()
    for flags in cases
    for name in ("s3", "adam")
    if name == "s3" or "--use-precision-aware-optimizer" not in flags
}


def test_every_known_size_is_of_a_layout():
    assert {f"2: {title}" for title in BYTES} <= LAYOUTS.keys()


@pytest.mark.parametrize(
    ("ranks", "title"), [(ranks, title) for title, (ranks, *_) in LAYOUTS.items()], ids=str
)
@on_ranks()
def test_real_ranks_allocate_what_is_planned(ranks, title):
    """Each rank plans for itself: its shard, its experts, its pipeline stage."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.training import global_vars, initialize

    from megatron_s3.mcore.planning import job, memory, parse

    _, name, flags = LAYOUTS[title]
    rank = torch.distributed.get_rank()
    args = parse.parse([*TINY, *ODD, "--optimizer", name, *flags], ranks)
    args.rank = rank
    global_vars.set_global_variables(args)
    parallel_state.destroy_model_parallel()  # the layout is another
    initialize._initialize_distributed(None, None, None)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    with Allocations() as allocations:
        model, optimizer = job.build()
        for chunk in model:
            for param in chunk.parameters():
                param.main_grad.normal_()
            chunk.finish_grad_sync()
        assert optimizer.step()[0]
    scalars = sum(
        t.nbytes
        for part in optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor) and not t.dim()
    )
    gc.collect()  # what only cycles hold is freed whenever the collector comes by
    found = memory.measure(model, optimizer, parallel_state.get_pipeline_model_parallel_rank())
    alive = allocations.alive()
    del model, optimizer
    global_vars.unset_global_variables()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()  # a plan makes one of its own
    assert job._rank(job.completed(args), rank)[0] == found
    # What is left are a step's few numbers: found_inf, loss scale, norms.
    assert 0 <= alive - scalars - found.total <= 64
    if ranks == 2 and (known := BYTES.get(title.removeprefix("2: "))):
        parts = (found.main_parameters, sum(found.states.values()), found.main_gradients)
        assert parts == tuple(n * found.updated for n in known)
