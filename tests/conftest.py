"""Settings that every test shares."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The same examples on every run and machine; no deadline, because a busy machine is not a bug.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("reproducible")

# The tensors are small: threads would only wait for each other where several tests run at a time.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the file with the longest test first, or other processes wait for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


@pytest.fixture(autouse=True)
def process_stays_as_it_is() -> Iterator[None]:
    """Fails a test after which the next ones would run in a process for the CPU."""
    before = torch.cuda.device_count
    yield
    assert torch.cuda.device_count is before, "the test has to do this in a process of its own"
