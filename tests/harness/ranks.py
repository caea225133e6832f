"""Tests that run inside ranks.

    @on_ranks(2)
    def test_something(case):
        torch.distributed.all_reduce(...)

The function runs in forks of a process that has imported Megatron and registered the plugin
(:mod:`tests.harness.forks`), so that nothing of it reaches pytest's own process.
"""

import base64
import functools
import importlib.util
import inspect
import logging
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.harness.forks import Forks
from tests.harness.releases import INSTALLED, unpacked
from tests.harness.trainer import forks

__all__ = ["on_ranks"]


def on_ranks(
    ranks: int = 1,
    release: str = INSTALLED,
    *,
    megatron: bool = True,
    started: Callable[[], Forks] | None = None,
) -> Callable[[Callable], Callable]:
    """Makes a test run on so many gloo ranks, with Megatron's parallel state initialized.

    Its arguments (parameters and fixtures) have to be picklable.  It fails if a rank fails, with
    what the ranks printed.  Parameters named ``release`` and ``ranks`` win over both.

    Args:
        ranks: number of processes, 8 at most.
        release: of Megatron-Core, one of :data:`tests.harness.releases.RELEASES`.
        megatron: False for ranks of torch's alone, in which the plugin is not registered.
        started: returns another process to fork from.
    """

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def run(**arguments: Any) -> None:
            chosen = arguments.get("release", release)
            count = arguments.get("ranks", ranks)
            folder = None if chosen == INSTALLED else unpacked(chosen)
            packed = base64.b64encode(pickle.dumps(arguments)).decode()
            argv = [inspect.getfile(test), test.__name__, packed, str(int(megatron))]
            with tempfile.NamedTemporaryFile("r", errors="replace") as log:
                imports = "megatron" if megatron else "optimizers"
                process = started() if started else forks(folder, imports)
                status = process.run(argv, count, log.name, program=__name__)
                assert status == 0, log.read()[-8000:]

        return run

    return decorate


def _main() -> None:
    """What a rank runs: argv holds the test's file, its name, its arguments, and for Megatron 1."""
    path, name, arguments, megatron = sys.argv[1:]
    torch.set_num_threads(1)
    logging.getLogger("megatron").setLevel(logging.ERROR)  # every setting of every object
    torch.distributed.init_process_group("gloo")
    if int(megatron):
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    try:
        getattr(module, name).__wrapped__(**pickle.loads(base64.b64decode(arguments)))
    except SystemExit as end:  # which would pass where its status is 0
        raise RuntimeError(f"the test has ended its rank with status {end.code}") from end
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main()
