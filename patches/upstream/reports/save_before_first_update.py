"""A checkpoint cannot be saved before the first update, while fp16 skips steps.  One process."""

import small_model
import torch

small_model.start()
model, optimizer = small_model.build(dtype=torch.float16)
model.zero_grad_buffer()
for param in model.parameters():
    param.main_grad.fill_(float("inf"))  # the loss scale is still too large
model.finish_grad_sync()
updated, _, _ = optimizer.step()
assert not updated
errors = []
(part,) = optimizer.chained_optimizers
for read in (part.state_dict, part.get_parameter_state_dp_zero):  # what a checkpoint consists of
    try:
        read()
    except (AssertionError, KeyError) as error:
        errors.append(f"{read.__name__}: {error!r}")
small_model.end("; ".join(errors) or None)
