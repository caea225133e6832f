"""The supported releases of megatron-core: the installed one, and the wheels unpacked beside it."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

INSTALLED = version("megatron-core")
#: Where scripts/test.sh unpacks the other supported wheels.
OTHERS = Path(__file__).parents[2] / ".venv/megatron-core"
RELEASES = ("0.17.1", "0.18.2", INSTALLED)


def unpacked(release: str) -> Path:
    """The folder that holds `megatron/` of a wheel; skips where it is not there."""
    if release == INSTALLED:
        return Path(find_spec("megatron.core").origin).parents[2]
    if not (OTHERS / release).is_dir():
        pytest.skip(f"megatron-core {release} is not unpacked at {OTHERS}; scripts/test.sh does it")
    return OTHERS / release
