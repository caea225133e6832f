"""The benchmark of the step: what it counts and writes. No time is asserted."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_s3 import S3
from megatron_s3.optimizers import OPTIMIZERS
from scripts.bench import candidates, machine, memory, step
from scripts.bench.shards import Shard
from scripts.bench.timing import Comparison, Timing, paired, phases, spread, table, write_png

ROOT = Path(__file__).resolve().parents[2]

ADAMW = {"norm": 4, "clip": 8, "step": 28, "copy": 6}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(memory, "FLAT", {"cpu": 5000})
    monkeypatch.setattr(memory, "COPIED", {"cpu": 1000})


@pytest.mark.usefixtures("small")
def test_every_candidate_is_measured_and_its_bytes_are_counted(tmp_path, capsys):
    words = "--device cpu --shapes flat --rounds 2 --threads 1 2 --elements-limit 3000".split()
    assert step.main([*words, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench_step.json").read_text())
    assert record["machine"]["torch"] == torch.__version__ and record["date"]
    one, two = record["comparisons"]
    assert (one["threads"], two["threads"]) == (1, 2)
    assert (one["elements"], one["cut_from"], one["shards"]) == (3000, 5000, 1)
    counted = {c["key"]: c["bytes_per_parameter"] for c in one["candidates"]}
    expected = {"adamw-fused": 46, "adamw-foreach": 46}
    for key in tuple(expected):
        expected |= {f"{key}/{phase}": count for phase, count in ADAMW.items()}
    expected["adamw-fused-unclipped"] = 38
    unclipped = {name: count for name, count in ADAMW.items() if name != "clip"}
    expected |= {f"adamw-fused-unclipped/{phase}": n for phase, n in unclipped.items()}
    expected["adamw-fused-bf16"] = 20
    expected |= {f"adamw-fused-bf16/{k}": n for k, n in {"norm": 2, "clip": 4, "step": 14}.items()}
    paths = ["portable"]
    if any(c["path"] == "C++ kernel" for c in one["candidates"]):  # else there is no compiler
        paths.append("cpp")
    for path in paths:
        for kind, count in {
            "fp32-grads-fp32-states": 30,
            "bf16-grads-fp32-states": 28,
            "fp32-grads-bf16-states": 22,
            "bf16-grads-bf16-states": 20,
        }.items():
            expected[f"s3-{path}-p3-{kind}"] = count
            if path == "cpp" and kind in ("fp32-grads-fp32-states", "bf16-grads-bf16-states"):
                expected[f"s3-{path}-p3-{kind}-statistics"] = count
            if path == "cpp":
                expected[f"s3-cpp-p3-{kind}/in cache"] = count
        if path == "cpp":
            expected["s3-cpp-p3-bf16-grads-small-states"] = 16
            expected["s3-cpp-p3-bf16-grads-small-states-statistics"] = 16
    assert counted == expected
    for c in one["candidates"]:
        assert len(c["rounds_ms"]) == 2 and c["launches"] is None
        gigabytes = c["bytes_per_parameter"] * 3000 / 1e9
        assert c["gb_s"] == pytest.approx(gigabytes / (c["ms"]["median"] / 1e3))
        assert c["host_ms"] == c["device_ms"] == c["ms"]
        assert list(c["ratios"]) == ["adamw-fused", "adamw-fused-unclipped", "adamw-fused-bf16"]
    for c, key in zip(one["candidates"], ("adamw-fused", None), strict=False):
        assert key is None or c["ratios"][key] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert (tmp_path / "bench_step.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert "cut off from 5,000" in shown.out and "S3 portable p=3" in shown.out
    assert "round 2 of 2" in shown.err


@pytest.mark.usefixtures("small")
def test_what_is_measured_is_a_step():
    shards = [Shard(300, 64, 0, 0), Shard(77, 5001, 0, 1), Shard(40, 400, 0, 0)]
    what = ("cpu", [3.0], [name for name in OPTIMIZERS if name != "s3"])
    for at, candidate in enumerate(candidates.candidates(memory.Memory(shards, "cpu"), *what)):
        held = memory.Memory(shards, "cpu")
        candidate = list(candidates.candidates(held, *what))[at]
        small_states = "small-states" in candidate.key  # of its own
        half = candidate.key == candidates.HALF or small_states
        stepped = held.model_params if half else held.params
        before = [p.clone() for p in stepped]
        candidate.step()
        for old, new, model in zip(before, stepped, held.model_params, strict=True):
            assert (old != new).float().mean() > 0.9, candidate.key
            assert torch.equal(model, new.bfloat16()), candidate.key
        held.check()
        states = [s for pairs in held.states.values() for pair in pairs for s in pair]
        changed = [bool(s.any()) for s in states]
        one = candidate.key.startswith(("lion", "sgdm", "signsgd"))
        own = 0 if small_states else 1 if one else 2
        assert sum(changed) == own * len(shards), candidate.key


@pytest.mark.usefixtures("small")
def test_clipping_clips_every_time():
    held = memory.Memory([Shard(100_000, 0, 0, 0)], "cpu")
    adamw = candidates.adamw(held, "fused")
    for _ in range(3):
        before = held.grads[torch.float32][0].clone()
        adamw.norm()
        adamw.clip()
        after = held.grads[torch.float32][0]
        ratio = (after.norm() / before.norm()).item()
        assert ratio == pytest.approx(1 - 1e-4, abs=2e-5)


@pytest.mark.usefixtures("small")
def test_without_clipping_gradients_stay():
    held = memory.Memory([Shard(1000, 0, 0, 0)], "cpu")
    before = held.grads[torch.float32][0].clone()
    made = {c.key: c for c in candidates.candidates(held, "cpu", [3.0])}
    made[candidates.UNCLIPPED].step()
    assert torch.equal(held.grads[torch.float32][0], before)
    made[candidates.BASELINE].step()
    assert not torch.equal(held.grads[torch.float32][0], before)


@pytest.mark.usefixtures("small")
def test_statistics_are_counted_where_the_name_says_so(monkeypatch):
    made = []
    monkeypatch.setattr(candidates, "S3", lambda *a, **k: made.append(S3(*a, **k)) or made[-1])
    held = memory.Memory([Shard(1000, 0, 0, 0)], "cpu")
    keys = [c.key for c in candidates.candidates(held, "cpu", [3.0]) if c.key.startswith("s3")]
    counting = [optimizer.host.statistics is not None for optimizer in made]
    assert counting == [key.endswith("-statistics") for key in keys]
    assert sum(counting) == 3


def test_megatron_is_asked_once_for_shards(monkeypatch, tmp_path):
    asked = []

    def answer(*what):
        asked.append(what)
        return [[7, 64, 0, 1]]

    monkeypatch.setattr(memory, "_asked", answer)
    known = tmp_path / "shards.json"
    for rank in (0, 0, 1, 1):
        assert memory.shards_of("345m-dp8", rank, "cpu", known) == [Shard(7, 64, 0, 1)]
    assert asked == [("345m-dp8", 0), ("345m-dp8", 1)]


def test_three_times_on_a_gpu(monkeypatch):
    """Wall and host from an empty stream; the device's behind work that outlasts the host."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("wait for the event")

        def elapsed_time(self, end):
            return 1.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: done.append(clocks))
    wall, host, device = machine.timed(lambda: done.append("call"), "cuda")
    clocks = done.pop(3)
    assert done == ["wait", "call", "wait", "record", "call", "record", "wait for the event"]
    assert device == 1.25 and 0 < host <= wall
    assert clocks >= 2e6 * (host + 0.4)  # an H200 has 1.98e6 clocks a millisecond


def test_what_no_tool_tells_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.clocks("cuda") == "unknown"
    assert machine.clocks("cpu") is None


@pytest.mark.usefixtures("small")
def test_a_step_that_leaves_nan_is_no_result():
    held = memory.Memory([Shard(300, 0, 0, 0)], "cpu")
    held.params[0][7] = torch.nan
    with pytest.raises(ArithmeticError):
        held.check()


def test_shards_keep_their_alignment_and_do_not_overlap():
    shards = [Shard(10, 9_000_003, 0, 0), Shard(5000, 64, 0, 1), Shard(7, 66, 1, 0)]
    starts, length = memory.placed(shards)
    assert [s % 4096 for s in starts] == [9_000_003 % 4096, 64, 66]
    spans = sorted((start, start + s.numel) for start, s in zip(starts, shards, strict=True))
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert spans[-1][1] == length < 4 * 4096
    kept = memory.cut(shards, 12)
    assert [(s.numel, s.offset, s.group) for s in kept] == [(10, 9_000_003, 0), (2, 64, 1)]


def test_without_megatron_only_flat_can_be_had(monkeypatch, tmp_path, capsys):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron/__init__.py").write_text("raise ImportError('no megatron here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(memory, "ROOT", ROOT)
    words = ["--device", "cpu", "--shapes", "345m-dp8", "--output", str(tmp_path / "out")]
    assert step.main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: 345m-dp8: ") and "megatron-core" in said and "flat" in said


@pytest.mark.thorough
@pytest.mark.slow
def test_shards_are_those_of_the_plan(tmp_path):
    pytest.importorskip("megatron.core")
    shards = memory.shards_of("345m-dp8", 0, "cpu")
    command = [sys.executable, "-m", "megatron_s3.launch.plan", "layouts/gpt2-345m/8gpu"]
    subprocess.run([*command, "--json", str(tmp_path / "plan")], check=True, cwd=ROOT)
    (rank,) = json.loads((tmp_path / "plan").read_text())["sizes"]["stages"]
    assert sum(s.numel for s in shards) == rank["updated"]
    ends = sorted((s.offset, s.offset + s.numel) for s in shards)
    assert all(a[1] <= b[0] for a, b in pairwise(ends))
    assert ends[-1][1] <= rank["buffers"][0]["elements"]
    assert {s.group for s in shards} == {0, 1}  # with weight decay and without


def test_spread_and_paired_rounds():
    assert vars(spread([4.0])) == {"median": 4.0, "q1": 4.0, "q3": 4.0}
    assert vars(spread([1.0, 2.0, 3.0, 4.0, 5.0])) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    # A machine that is slower in its second round: the ratio does not see it.
    assert vars(paired([1.0, 10.0], [2.0, 20.0])) == {"median": 0.5, "q1": 0.5, "q3": 0.5}


def test_figures_of_made_up_times(tmp_path):
    made = Comparison(
        shape="made-up",
        elements=1_000_000,
        shards=3,
        cut_from=None,
        device="cuda",
        threads=None,
        baselines=["a", "u-unclipped"],
        copy_bytes=8_000_000,
        copy_ms=[1.0, 1.0],
        timings=[
            Timing("a", "AdamW", "adamw", 46, [10.0, 12.0], [1.0, 1.0], [9.0, 9.0], 9),
            Timing("a/norm", "norm", "phase", 4, [2.0, 2.0], [0.1, 0.1], [2.0, 2.0], 2),
            Timing("u-unclipped", "AdamW'", "adamw", 38, [8.0, 9.6], [1.0] * 2, [7.0] * 2, 9),
            Timing("s", "S3", "kernel", 30, [5.0, 6.0], [0.5, 0.5], [4.0, 4.0], 1),
            Timing("p", "S3 portable", "portable", 30, [500.0] * 2, [0.5] * 2, [500.0] * 2, 99),
        ],
        clocks=["1980 MHz", "1755 MHz"],
    )
    s3 = made.timings[3]
    assert made.copy_gb_s == pytest.approx(8)
    assert made.gb_s(s3) == pytest.approx(30e6 / 4e-3 / 1e9)  # on the device
    assert made.ratio(s3).median == 0.5  # of wall times
    assert made.ratio(s3, "u-unclipped").median == 0.625
    assert made.floor(s3) == pytest.approx((30e6 / 8e9 * 1e3) / 11)
    lines = table(made).splitlines()
    row = next(line for line in lines if line.startswith("S3 ")).split()
    assert row[1:7] == ["5.500", "0.500", "4.000", "0.500", "0.625", "0.500-0.500"]
    assert row[7:] == ["30", "7.5", "94%", "1"]
    assert any(line.startswith("  norm") for line in lines)
    assert lines[-1] == "clocks before and after: 1980 MHz; 1755 MHz"
    shown = phases([made, made]).splitlines()
    assert [line.split()[0] for line in shown[1:]] == ["made-up", "AdamW'", "S3"] * 2
    assert shown[3].split()[1:] == ["5.500", "0.500", "4.000", "0.500", "0.625", "94%"]
    write_png([made, made], "made up", tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000
