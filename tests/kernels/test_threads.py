"""Every share of a step is done once, whatever becomes of the threads."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_s3 import S3
from megatron_s3.kernels.cpu import threads
from megatron_s3.kernels.cpu.threads import spread

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("after", [0, 1])
def test_threads_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, after: int, queued: bool
) -> None:
    """Exact: also where a pool has taken the work before it fails to start a thread."""

    class Pool(ThreadPoolExecutor):
        calls = 0

        def submit(self, *args: Any) -> Any:
            self.calls += 1
            if self.calls <= after or queued:
                super().submit(*args)
            if self.calls > after:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(threads, "_threads", Pool(4))
    monkeypatch.setattr(threads, "_threads_count", 4)
    for _ in range(50):
        done: list[tuple[int, int]] = []
        shares = [(i, i + 1) for i in range(5)]
        spread(lambda *share, done=done: done.append(share), shares)
        assert sorted(done) == shares


def test_all_shares_end_before_an_error_is_raised() -> None:
    """Exact: memory that threads still write to must not be freed."""
    done = []

    def run(i: int) -> None:
        if i == 0:
            raise KeyboardInterrupt
        done.append(i)

    with pytest.raises(KeyboardInterrupt):
        spread(run, [(i,) for i in range(4)])
    assert sorted(done) == [1, 2, 3]


def test_no_share_is_no_work() -> None:
    spread(lambda: 1 / 0, [])


def test_two_threads_step_two_optimizers() -> None:
    """Bitwise as one after the other, with pools that grow meanwhile."""

    def build() -> list[S3]:
        generator = torch.Generator().manual_seed(0)
        optimizers = []
        for n in (300_000, 200_000):
            param = torch.nn.Parameter(torch.randn(n, generator=generator))
            param.grad = torch.randn(n, generator=generator)
            optimizers.append(S3([param], lr=0.1))
        return optimizers

    def steps(optimizer: S3, count: int) -> None:
        torch.set_num_threads(count)
        for _ in range(20):
            optimizer.step()

    before = torch.get_num_threads()
    one, other = build(), build()
    try:
        for i, optimizer in enumerate(one):
            steps(optimizer, 2 + i)
        running = [threading.Thread(target=steps, args=(o, 2 + 3 * i)) for i, o in enumerate(other)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.param_groups[0]["params"][0], b.param_groups[0]["params"][0])


def test_steps_while_the_interpreter_ends() -> None:
    """Bitwise: in a function of atexit, and in a thread that outlives the main one."""
    code = """
import atexit, threading, torch
from megatron_s3 import S3
torch.set_num_threads(3)
def build():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(300_000)); p.grad = torch.randn(300_000)
    return p, S3([p], lr=0.1)
(a, first), (b, second), (c, third) = build(), build(), build()
for optimizer in (first, second, third):
    optimizer.step()
first.step(); first.step()
def outlive():
    threading.main_thread().join()
    second.step(); second.step()
    print(torch.equal(a, b), flush=True)
def leave():
    third.step(); third.step()
    print(torch.equal(a, c), second.path, third.path, flush=True)
atexit.register(leave)
threading.Thread(target=outlive).start()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (run.stdout, run.returncode) == ("True\nTrue C++ kernel C++ kernel\n", 0), run.stderr
