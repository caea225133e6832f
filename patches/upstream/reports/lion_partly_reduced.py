"""Lion with the distributed optimizer steps on gradients that are not reduced.

pip install emerging-optimizers
torchrun --nproc-per-node 2 lion_partly_reduced.py
"""

import small_model
import torch

small_model.start()
ranks = torch.distributed.get_world_size()
assert ranks > 1, "run it with torchrun on two or more ranks"
found = {}
for sharded in (False, True):
    try:
        model, optimizer = small_model.build("lion", sharded=sharded)
    except (AssertionError, ValueError, NotImplementedError) as error:
        small_model.end(None if sharded else f"Lion is not built: {error}")  # refused: no fault
    _, norm, _ = small_model.step(model, optimizer)
    weights = torch.cat([param.detach().float().flatten() for param in model.parameters()])
    of_ranks = [torch.empty_like(weights) for _ in range(ranks)]
    torch.distributed.all_gather(of_ranks, weights)
    found[sharded] = max(float((other - weights).abs().max()) for other in of_ranks)
    if torch.distributed.get_rank() == 0:
        kinds = [type(part).__name__ for part in optimizer.chained_optimizers]
        print(f"use_distributed_optimizer={sharded}: {kinds}, gradient norm {norm}")
        print(f"    the weights of the ranks differ by up to {found[sharded]}")
small_model.end("after a step the ranks hold different weights" if found[True] else None)
