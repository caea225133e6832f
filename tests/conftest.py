"""Settings that every test shares."""

import torch
from hypothesis import settings

# The same examples on every run and machine; no deadline, because a busy machine is not a bug.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("reproducible")

# The tensors are small: threads would only wait for each other where several tests run at a time.
torch.set_num_threads(1)
