"""A fully_reshardable checkpoint holds other numbers than the optimizer.  One process."""

import small_model
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

small_model.start()
# Two buckets: 20 + 600 elements, of which the first has 104 elements of padding at its end.
model, optimizer = small_model.build(bucket_size=500)
small_model.step(model, optimizer)
params = dict(model.named_parameters())
weights = {
    name: ShardedTensor.from_rank_offsets(name, param, replica_id=(0, 0, 0))
    for name, param in params.items()
}
metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
saved = optimizer.sharded_state_dict(weights, metadata=metadata)["param_state"]

(part,) = optimizer.chained_optimizers
wrong = []
for tensors in saved.values():
    for kind, tensor in tensors.items():
        if not isinstance(tensor, ShardedTensor):
            continue
        name = tensor.key.split(f"state.{kind}.")[1]
        held = part._get_main_param_and_optimizer_states(params[name])[kind]
        if not torch.equal(held.flatten(), tensor.data.flatten()):
            wrong.append(tensor.key)
print("\n".join(wrong))
of = sum(isinstance(t, ShardedTensor) for tensors in saved.values() for t in tensors.values())
small_model.end(
    f"{len(wrong)} of {of} tensors differ from what the optimizer holds" if wrong else None
)
