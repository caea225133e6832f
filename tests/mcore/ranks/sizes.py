"""Real ranks: what they allocate is what the plan of them says, in several layouts one by one."""

import gc
import os

import torch
import torch.distributed
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_s3

megatron_s3.register()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.training import global_vars, initialize  # noqa: E402

from megatron_s3.mcore.planning import job, memory, parse  # noqa: E402
from tests.harness.trainer import TINY  # noqa: E402

# Sizes that leave gaps: no dimension is a multiple of 64 x ranks, and no bucket ends at one.
ODD = """--plugin-device cpu --train-iters 6 --hidden-size 40 --ffn-hidden-size 132
--num-attention-heads 2 --make-vocab-size-divisible-by 2 --vocab-size 201""".split()
BF16, SHARDED = ["--bf16"], ["--use-distributed-optimizer"]
BUCKETS = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "9000"]
TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
EP = ["--num-experts", "4", "--expert-model-parallel-size", "2"]
AWARE = [*BF16, *SHARDED, "--use-precision-aware-optimizer"]
BF16_STATES = ["--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"]
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
    ],
    1: [[], BF16, ["--fp16"], BF16 + SHARDED],
}


#: Bytes a parameter that the optimizer updates, of main parameters, states and gradient copies.
BYTES = {
    "s3 --bf16 --use-distributed-optimizer": (4, 8, 0),
    "s3 --bf16 --use-distributed-optimizer --grad-reduce-in-bf16": (4, 8, 0),
    "s3 --bf16 --grad-reduce-in-bf16": (4, 8, 0),
    "adam --bf16 --grad-reduce-in-bf16": (4, 8, 4),
    f"s3 {' '.join(AWARE)}": (4, 8, 0),
    f"s3 {' '.join([*AWARE, *BF16_STATES, *BUCKETS])}": (4, 4, 0),
    f"s3 {' '.join([*AWARE, *BF16_STATES])} --main-grads-dtype bf16": (4, 4, 0),
    f"s3 {' '.join([*AWARE, '--exp-avg-sq-dtype', 'bf16', *EP])}": (4, 6, 0),
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


def allocated(args) -> tuple[memory.Rank, int, int]:
    """Builds, takes a step and counts: by category, by storage, and the scalars of states."""
    global_vars.set_global_variables(args)
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
    stage = parallel_state.get_pipeline_model_parallel_rank()
    gc.collect()  # what only cycles hold is freed whenever the collector comes by
    found = memory.measure(model, optimizer, stage)
    alive = allocations.alive()
    parallel_state.destroy_model_parallel()
    global_vars.unset_global_variables()
    return found, alive, scalars


def world(ranks: int) -> list[tuple]:
    """Every case of a world that the first ranks make up, on each of them."""
    runs = []
    for flags in CASES[ranks]:
        # Adam's precision-aware states are Transformer Engine's.
        for name in ("s3",) if "--use-precision-aware-optimizer" in flags else ("s3", "adam"):
            title = f"{name} {' '.join(flags)}"
            # A world for each: groups keep their threads and sockets until their world ends.
            store = torch.distributed.PrefixStore(f"{ranks} {title}", STORE)
            torch.distributed.init_process_group("gloo", rank=RANK, world_size=ranks, store=store)
            args = parse.parse([*TINY, *ODD, "--optimizer", name, *flags], ranks)
            args.rank = RANK
            every = [None] * ranks
            torch.distributed.all_gather_object(every, allocated(args))
            gc.collect()  # models keep groups
            torch.distributed.destroy_process_group()
            runs.append((args, title, every))
    return runs


RANK = int(os.environ["RANK"])
STORE = torch.distributed.TCPStore(
    os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False
)
checked, compared = 0, set()
for ranks in CASES:
    for args, title, every in world(ranks) if ranks > RANK else []:
        # Each rank plans for itself: its shard, its experts, its pipeline stage.
        found, alive, scalars = every[RANK]
        planned = job.plan_rank(job.completed(args), RANK)
        assert planned == found, f"{ranks} ranks, {title}:\nplan {planned}\nreal {found}"
        # What is left are a step's few numbers: found_inf, loss scale, norms.
        rest = alive - scalars - planned.total
        assert 0 <= rest <= 64, f"{ranks} ranks, {title}: {rest} bytes are in no category"
        checked += 1
        if title in BYTES and ranks == 2:
            parts = (found.main_parameters, sum(found.states.values()), found.main_gradients)
            assert parts == tuple(n * found.updated for n in BYTES[title]), (title, parts)
            compared.add(title)
        if RANK == 0:
            print(f"sizes: {ranks} ranks, {title}: {planned.total} bytes as planned, {rest} beside")
assert RANK > 1 or compared == set(BYTES), set(BYTES) - compared
if RANK == 0:
    print(f"sizes: ok, {checked}")
