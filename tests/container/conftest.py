import os
from collections.abc import Iterator

import pytest

from megatron_s3 import __version__
from tests.container import images


def _built(target: str) -> Iterator[tuple[str, str]]:
    if reason := images.unusable():
        pytest.skip(f"no image can be made here: {reason}")
    name = f"{images.NAME}/{target}:{os.getpid()}"
    labels = (
        f"VERSION={__version__}",
        "REVISION=0123abc",
        "SOURCE=https://example.org/megatron-s3",
    )
    done = images.build(target, name, *(f"--build-arg={label}" for label in labels))
    assert done.returncode == 0, done.stdout[-4000:]
    yield name, done.stdout
    images.remove(name)


@pytest.fixture(scope="session")
def gpu_image():
    """The target `gpu` on a stand-in for NGC's base: its name, and what the build said."""
    yield from _built("gpu")


@pytest.fixture(scope="session")
def cpu_image():
    """The target `cpu`: its name, and what the build said."""
    yield from _built("cpu")
