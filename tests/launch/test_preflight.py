"""The look at the nodes, with processes of this machine for nodes."""

import multiprocessing
import os
import socket
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from megatron_s3.launch import blame, preflight


def _node(rank: int, words: list[str], port: int, log: Path, break_it) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w")  # instead of pytest's
    os.environ |= {
        "SLURM_NODEID": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if break_it:
        break_it(rank)
    os._exit(preflight.main(words))


@pytest.fixture
def nodes(tmp_path: Path):
    """Runs the preflight on as many of the named nodes as asked for; statuses and lines."""

    def run(
        *more: str, names: str = "a,b", started: int = 2, timeout: float = 120, break_it=None
    ) -> tuple[list[int | None], list[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["tiny-s3", "--run-dir", str(tmp_path / "run"), "--nodes", names]
        words += ["--timeout", str(timeout), *more]
        log = tmp_path / "log"
        fork = multiprocessing.get_context("fork")
        children = [
            fork.Process(target=_node, args=(rank, words, port, log, break_it))
            for rank in range(started)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
        lines = log.read_text().splitlines()  # torch's own logger was set up before the fork
        return [c.exitcode for c in children], [x for x in lines if not x.startswith("[W")]

    return run


def test_good_nodes(nodes, tmp_path: Path) -> None:
    statuses, lines = nodes()
    assert statuses == [0, 0]
    assert len(lines) == 1 and lines[0].startswith(
        "preflight: 2 nodes, on CPUs: all checks passed"
    ), lines
    assert not list((tmp_path / "run").iterdir())


def test_missing_node(nodes) -> None:
    statuses, lines = nodes(names="a,b,c", timeout=8)
    assert statuses == [1, 1]
    assert lines == ["preflight: c: did not report within 8 s"]


def test_missing_gpus_on_all(nodes) -> None:
    statuses, lines = nodes("--set", "plugin_device=cuda")
    assert statuses == [1, 1]
    assert lines == [
        f"preflight: {name}: has 0 GPUs, and the configuration needs 2 (launch.nproc_per_node)"
        for name in "ab"
    ]


def test_no_room(nodes) -> None:
    statuses, lines = nodes("--min-free", "1e9")
    assert statuses == [1, 1]
    assert len(lines) == 2 and all("and MIN_FREE_GIB asks for 1e+09" in line for line in lines)


def test_another_disk(nodes, tmp_path: Path) -> None:
    def elsewhere(rank: int) -> None:
        if rank == 1:
            look = preflight._look
            preflight._look = lambda node, _, free: look(node, [tmp_path / "local"], free)

    statuses, lines = nodes(break_it=elsewhere)
    assert statuses == [1, 1]
    assert len(lines) == 1 and lines[0].startswith("preflight: b: ") and "shared" in lines[0]


def test_checkpoints_elsewhere(nodes, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    statuses, lines = nodes("--set", f"save={tmp_path}/file/checkpoints")
    assert statuses == [1, 1]
    assert lines[0] == f"preflight: a: cannot write to {tmp_path}/file/checkpoints: Not a directory"


def test_disk_of_the_first_node_alone(nodes, tmp_path: Path) -> None:
    def elsewhere(rank: int) -> None:
        if rank == 0:
            (tmp_path / "file").touch()
            look = preflight._look
            preflight._look = lambda node, _, free: look(node, [tmp_path / "file" / "x"], free)

    statuses, lines = nodes(break_it=elsewhere)
    assert statuses == [1, 1]
    assert lines == [f"preflight: a: cannot write to {tmp_path}/file/x: Not a directory"]


def test_wrong_arithmetic(nodes) -> None:
    def wrong(rank: int) -> None:
        import torch

        if rank == 1:
            torch.Tensor.__matmul__ = lambda self, other: self

    statuses, lines = nodes(break_it=wrong)
    assert statuses == [1, 1]
    assert lines == ["preflight: b: cpu gives a wrong product of matrices"]


def test_dead_network_is_the_node_s_that_reaches_none(nodes) -> None:
    def deaf(rank: int) -> None:
        import torch.distributed

        if rank == 2:
            torch.distributed.init_process_group = lambda *_, **__: 1 / 0

    statuses, lines = nodes(names="a,b,c", started=3, timeout=8, break_it=deaf)
    assert statuses == [1, 1, 1]
    assert lines[0] == "preflight: c: no all-reduce with any other node"
    assert "preflight:   c: the all-reduce with gloo fails: division by zero" in lines[1:]
    assert all(line.startswith("preflight:   ") for line in lines[1:])


def test_all_reduce_within_one_node(nodes) -> None:
    """Its own reason is the answer: there is no other node to compare it with."""

    def two_devices(_: int) -> None:
        import torch.distributed

        torch.distributed.init_process_group = lambda *_, **__: 1 / 0
        preflight.computes = lambda _: None
        look = preflight._look
        preflight._look = lambda node, *rest: look(replace(node, devices=2), *rest)
        torch.cuda.set_device = lambda _: None

    statuses, lines = nodes(names="a", started=1, break_it=two_devices)
    assert statuses == [1]
    assert lines == ["preflight: a: the all-reduce with gloo fails: division by zero"]


def test_the_ranks_environment_is_in_force(nodes) -> None:
    """Gloo finds the interface that is asked for, or says why not."""
    statuses, lines = nodes("--set", "launch.environment.GLOO_SOCKET_IFNAME=nosuch0")
    assert statuses == [1, 1]
    assert any("nosuch0" in line for line in lines), lines


def test_gloo_is_tried_too_where_the_ranks_use_nccl(nodes) -> None:
    assert preflight._backends(0, False) == ("gloo",)
    assert preflight._backends(8, False) == ("nccl", "gloo")
    assert preflight._backends(8, True) == ("nccl",)

    def two(_: int) -> None:
        preflight._backends = lambda *_: ("gloo", "no such backend")

    statuses, lines = nodes(break_it=two)
    assert statuses == [1, 1]
    assert any("a: the all-reduce with no such backend fails: " in line for line in lines), lines


def test_finished_run_is_not_looked_at(nodes, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "iter_0000030").mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("30")
    statuses, lines = nodes(names="a,b,c", timeout=8)
    assert statuses == [0, 0]
    assert lines == [
        "preflight: training is already finished (iteration 30); the nodes are not checked"
    ]


@pytest.mark.parametrize("nodes", range(2, 9))
def test_rounds_meet_each_neighbour_once_and_nobody_twice_at_a_time(nodes: int) -> None:
    rounds = blame.rounds(nodes)
    for together in rounds:
        members = list(chain(*together))
        assert len(members) == len(set(members))
    ring = {frozenset((i, (i + 1) % nodes)) for i in range(nodes)}
    met = [frozenset(pair) for pair in chain(*rounds)]
    assert set(met) == ring and len(met) == len(ring)


def test_blame() -> None:
    names = ["a", "b", "c", "d"]
    assert blame.blame(names, []) == {}
    assert list(blame.blame(names, [(1, 2), (2, 3)])) == [2]
    assert list(blame.blame(names, [(0, 1), (1, 2), (2, 3)])) == [1, 2]
    assert blame.blame(names, [(3, 0)]) == {3: "d and a: no all-reduce between the two"}
    assert list(blame.blame(names[:2], [(0, 1)])) == [0]


def test_outside_of_a_job(capsys: pytest.CaptureFixture) -> None:
    assert preflight.main(["tiny-s3", "--nodes", "a"]) == 2
    assert "SLURM_NODEID is not set" in capsys.readouterr().err
