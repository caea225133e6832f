"""The CPU in place of a CUDA device.

What changes torch for good runs in a process of its own.
"""

import textwrap
from pathlib import Path

import pytest
import torch

from megatron_s3.mcore import cpu_device
from tests.harness import fresh
from tests.harness.trainer import REPOSITORY, train

ON_CPU = """
import torch
from megatron_s3.mcore import cpu_device

cpu_device.use_cpu()
cpu_device.use_cpu()
"""


def passes(program: str) -> None:
    run = fresh.run("-c", textwrap.dedent(program), cwd=REPOSITORY)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Keeps torch as it is; grows by one with each switch to the CPU."""
    switches: list[bool] = []
    monkeypatch.setattr(cpu_device, "use_cpu", lambda: switches.append(True))
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return switches


@pytest.mark.parametrize(
    ("asked", "has_cuda", "got", "line"),
    [
        ("auto", True, "cuda", ""),
        ("cuda", True, "cuda", ""),
        ("cpu", True, "cpu", "(--plugin-device cpu)"),
        ("auto", False, "cpu", "(torch sees no CUDA device)"),
        ("cpu", False, "cpu", "(--plugin-device cpu)"),
    ],
)
def test_select(asked, has_cuda, got, line, switched, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert cpu_device.select(asked) == got
    assert len(switched) == (got == "cpu")
    printed = f"[megatron_s3] training on the CPU with gloo {line}\n" if line else ""
    assert capsys.readouterr().out == printed


def test_only_the_first_rank_of_a_node_says_so(switched, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("RANK", "1")
    assert cpu_device.select("auto") == "cpu"
    assert not capsys.readouterr().out
    for rank, local, said in (
        ("0", "0", "training on the CPU with gloo (torch sees no CUDA device)"),
        ("9", "1", ""),
        ("8", "0", "rank 8 trains on the CPU with gloo (torch sees no CUDA device)"),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        cpu_device.select("auto")
        assert capsys.readouterr().out == (said and f"[megatron_s3] {said}\n")


def test_cuda_without_a_device_names_the_flag(switched, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="--plugin-device cuda: torch sees no CUDA device"):
        cpu_device.select("cuda")
    assert not switched


def test_unknown_device(switched) -> None:
    with pytest.raises(ValueError, match="--plugin-device tpu: expected auto, cuda or cpu"):
        cpu_device.select("tpu")


def test_the_import_changes_nothing() -> None:
    passes(
        """
        import sys
        import torch

        before = torch.cuda.current_device, torch.cuda.Stream, torch.distributed.isend
        from megatron_s3.mcore import cpu_device

        assert (torch.cuda.current_device, torch.cuda.Stream, torch.distributed.isend) == before
        assert not cpu_device.active()
        assert "megatron" not in sys.modules
        """
    )


def test_switched_for_good() -> None:
    passes(
        ON_CPU
        + textwrap.dedent(
            """
            assert cpu_device.active()
            assert cpu_device.select("auto") == cpu_device.select("cpu") == "cpu"
            try:
                cpu_device.select("cuda")
            except RuntimeError as error:
                assert "the process is on the CPU already" in str(error)
            else:
                raise AssertionError

            # A checkpoint writer that Megatron spawns knows, too.
            context = torch.multiprocessing.get_context("spawn")
            answer = context.Queue()
            child = context.Process(target=lambda: answer.put(cpu_device.active()))
            child.start()
            assert answer.get(timeout=60)
            child.join()
            """
        )
    )


def test_tensors_live_on_the_cpu() -> None:
    passes(
        ON_CPU
        + textwrap.dedent(
            """
            on_cpu = [
                torch.zeros(2, device="cuda"),
                torch.zeros(2, device="cuda:1"),
                torch.zeros(2, device=torch.device("cuda", 0)),
                torch.zeros(2, device=torch.cuda.current_device()),
                torch.zeros(2, pin_memory=True),
                torch.zeros(2).cuda(non_blocking=True),
                torch.zeros(2).to("cuda", torch.bfloat16),
                torch.zeros(2).to(0),
                torch.zeros(2).to(device="cuda"),
                torch.zeros(2).pin_memory(),
                torch.cuda.FloatTensor([1.0, 2.0]),
                torch.nn.Linear(2, 2).cuda(0).weight,
                torch.nn.Linear(2, 2, device="cuda").to("cuda").weight,
            ]
            assert {tensor.device.type for tensor in on_cpu} == {"cpu"}
            assert on_cpu[6].dtype == torch.bfloat16
            on_cpu[0].record_stream(torch.cuda.current_stream())

            # An int is a device only where one is expected.
            assert torch.zeros(2).sum(0).item() == 0
            # What DistributedOptimizer tells 16-bit parameters by.
            assert on_cpu[6].type() == "torch.cuda.BFloat16Tensor"
            assert torch.nn.Parameter(torch.zeros(1)).type() == "torch.cuda.FloatTensor"
            assert torch.zeros(1).type(torch.float16).dtype == torch.float16

            # torch.compile is off: it could not see through any of this.
            assert torch.compile(lambda x: x + 1)(torch.zeros(1, device="cuda")).item() == 1
            """
        )
    )


def test_the_device() -> None:
    passes(
        ON_CPU
        + textwrap.dedent(
            """
            assert torch.cuda.is_available() and type(torch.cuda.current_device()) is int
            torch.cuda.set_device(1)
            assert torch.cuda.current_device() == 0 < torch.cuda.device_count()
            # Asserts of Megatron on CUDA_DEVICE_MAX_CONNECTIONS end here.
            assert torch.cuda.get_device_properties(torch.device("cuda:0")).major == 10

            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), torch.cuda.device(0):
                begin.record()
                end.record(side)
            end.synchronize()
            assert end.query() and begin.elapsed_time(end) == 0.0

            torch.cuda.reset_peak_memory_stats()
            assert torch.cuda.max_memory_allocated() == 0
            assert torch.cuda.memory_stats()["reserved_bytes.all.peak"] == 0

            # torch's own optimizers take the CPU for what it is.
            weight = torch.ones(2, requires_grad=True, device="cuda")
            weight.sum().backward()
            torch.optim.AdamW([weight]).step()
            """
        )
    )


def test_random_numbers() -> None:
    passes(
        ON_CPU
        + textwrap.dedent(
            """
            def draw():
                return torch.rand(4, device="cuda").tolist()

            torch.manual_seed(1)
            first = draw()
            torch.cuda.manual_seed(1)
            assert draw() == first

            state = torch.cuda.get_rng_state()
            second = draw()
            torch.cuda.set_rng_state(state)
            assert draw() == second
            torch.cuda.default_generators[torch.cuda.current_device()].set_state(state)
            assert draw() == second

            torch.cuda.set_rng_state(state)
            next(iter(torch.utils.data.DataLoader([1, 2])))
            assert draw() == second
            """
        )
    )


def test_gloo_sends_what_was_there_at_the_call(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        ON_CPU
        + textwrap.dedent(
            """
            import torch.distributed as dist

            dist.init_process_group("gloo")
            rank = dist.get_rank()
            group = dist.group.WORLD
            # Split sizes as tensors, as Megatron's token dispatcher has them.
            sizes = torch.tensor([1, 2])
            sent = torch.full((3,), float(rank))
            received = torch.empty(2 * (rank + 1))
            dist.all_to_all_single(
                received,
                sent,
                output_split_sizes=torch.tensor([rank + 1, rank + 1]),
                input_split_sizes=sizes,
                group=group,
            )
            assert received.tolist() == [0.0] * (rank + 1) + [1.0] * (rank + 1)

            # The sender frees its memory before gloo has read it, and fills it anew.
            many = 1 << 22
            for batched in (False, True):
                value = torch.full((many,), 7.0) if rank == 0 else torch.empty(many)
                dist.barrier()
                call = dist.isend if rank == 0 else dist.irecv
                if batched:
                    works = dist.batch_isend_irecv([dist.P2POp(call, value, 1 - rank, group)])
                else:
                    works = [call(value, 1 - rank, group=group)]
                if rank == 0:
                    value.data = torch.empty(1)
                    other = torch.zeros(many)
                for work in works:
                    work.wait()
                assert rank == 0 or bool((value == 7.0).all())
            print("both ranks agree", flush=True)
            """
        )
    )
    run = train(ranks=2, command=(str(program),), tiny=False)
    assert run.log.count("both ranks agree") == 2
