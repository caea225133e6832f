"""Processes that have imported Megatron-Bridge, which takes ten seconds."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.forks import Forks
from tests.harness.ranks import on_ranks
from tests.harness.trainer import REPOSITORY

__all__ = ["FOLDER", "in_bridge", "process"]

#: Where scripts/test.sh unpacks Bridge, with the packages that it needs beside the project's own;
#: the environment may name another release.
FOLDER = REPOSITORY / ".venv/megatron-bridge" / os.environ.get("MEGATRON_S3_BRIDGE", "0.6.2")


@functools.cache
def process() -> Forks:
    """Returns a process whose forks run :mod:`tests.bridge.program`; the plugin is not registered.

    Skips the test where there is no Bridge.
    """
    if not FOLDER.is_dir():
        pytest.skip(f"Megatron-Bridge is not unpacked at {FOLDER}; scripts/test.sh does it")
    return Forks(FOLDER, Path(__file__).with_name("program.py"), imports="optimizers")


def in_bridge(test: Callable) -> Callable:
    """Makes a test run in a fork, in which Bridge can be imported."""
    return on_ranks(started=process)(test)
