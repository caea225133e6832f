"""The acceptance command: tables, limits, crashes, and a rehearsal. Nothing here has a GPU."""

import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_s3.kernels import portable
from megatron_s3.rules.s3 import s3_update
from scripts.acceptance import __main__ as command
from scripts.acceptance import gpt, kernels, speed, training
from scripts.acceptance.report import FILES, MOST, OWN, Report, status, summary
from scripts.acceptance.rows import Row, Writer, read, table
from scripts.acceptance.runner import Section, Stage, Stopped, run_all
from scripts.acceptance.task import Task

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu_acceptance.sh"
F32, BF16 = torch.float32, torch.bfloat16


def section(program: str, limit: float = 20, name: str = "kernels", **more) -> Section:
    """One that runs a program, given a ``row`` to write rows with, in its folder."""
    start = f"""
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1]) / "{name}"
file = open(folder / "rows.jsonl", "w")
def row(check, status="passed", **more):
    line = {{"section": "{name}", "check": check, "status": status, **more}}
    print(json.dumps(line), file=file, flush=True)
"""
    return Section(name, "a look", limit, command=(sys.executable, "-c", start + program), **more)


def placed(one: Section, work: Path) -> Section:
    return replace(one, command=(*one.command, str(work)))


class Bench:
    """Runs stages of made-up sections, with folders of their own."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.work, self.output, self.device = folder / "work", folder / "output", device
        self.work.mkdir()
        self.output.mkdir()
        self.said: list[str] = []
        self.names = ["kernels", "memory", "speed", "gpt"]
        self.report = Report(self.output, self.work, {"commit": "abc"}, self.names, "a note")

    def run(self, *stages: list[Section], limit: float = 60, weights=(1, 1, 1)) -> list[Row]:
        given = [
            Stage([placed(one, self.work) for one in stage], weight)
            for stage, weight in zip(stages, weights, strict=False)
        ]
        deadline = time.monotonic() + limit
        return run_all(given, self.device, self.work, self.report, deadline, self.said.append)

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.output.iterdir()}

    def written(self) -> list[dict]:
        return json.loads((self.output / "acceptance.json").read_text())["rows"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# ---- one section ---------------------------------------------------------------------------------


def test_rows_of_a_section_that_ends_well(bench: Bench) -> None:
    found = bench.run([section("row('a'); row('b', 'skipped', detail='why'); print('said')")])
    assert [(r.check, r.status, r.detail) for r in found] == [
        ("a", "passed", ""),
        ("b", "skipped", "why"),
    ]
    assert (bench.work / "kernels/log.txt").read_text() == "said\n"
    assert status(found) == 0


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("print('CUDA error'); sys.exit(3)", "ended with exit status 3: CUDA error"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended with SIGSEGV: it printed nothing"),
        ("raise RuntimeError('illegal memory access')", "illegal memory access"),
    ],
)
def test_a_crash_fails_the_section_and_keeps_its_rows(end: str, said: str, bench: Bench) -> None:
    found = bench.run([section(f"row('before'); {end}")])
    assert [(r.check, r.status) for r in found] == [
        ("before", "passed"),
        ("the section kernels", "failed"),
    ]
    assert said in found[1].detail
    assert status(found) == 1


def test_the_time_limit_ends_a_section_with_all_that_it_started(bench: Bench) -> None:
    """The process that it has started, too, which is told by the end of a pipe."""
    pipe = bench.work / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    program = f"""
row('before')
import subprocess
child = [sys.executable, '-c', 'import time; time.sleep(60)']
subprocess.Popen(child, stdout=open({str(pipe)!r}, 'w'))
print('waiting', flush=True)
time.sleep(60)
"""
    found = bench.run([section(program, limit=1.5)])
    assert select.select([reading], [], [], 10)[0], "what it started runs on"
    assert os.read(reading, 1) == b""  # nobody holds the other end
    os.close(reading)
    assert [(r.check, r.status) for r in found] == [
        ("before", "passed"),
        ("the section kernels", "failed"),
    ]
    assert found[1].detail == "did not end within 2 s; its last line: waiting"


def test_no_rows_are_a_failure_and_torn_ones_are_left_out(bench: Bench) -> None:
    torn = "row('a'); file.write('{\"section\": \"on')"
    found = bench.run([section("pass"), section(torn, name="memory")])
    assert [(r.section, r.status, r.detail) for r in found] == [
        ("kernels", "failed", "reported nothing"),
        ("memory", "passed", ""),
    ]


# ---- all of them ---------------------------------------------------------------------------------


def test_sections_that_hang_are_ended_within_the_limit_of_all(bench: Bench) -> None:
    """A stage takes its share of the time alone; what finds none left has failed or is skipped."""
    hang = "row('began'); time.sleep(100)"
    begin = time.monotonic()
    found = bench.run(
        [section(hang, 100), section(hang, 100, "memory")],
        [section(hang, 100, "speed")],
        [section(hang, 100, "gpt", least=50)],
        limit=9,
    )
    assert time.monotonic() - begin < 9
    rows = {(r.section, r.check): r for r in found}
    for name in ("kernels", "memory", "speed"):
        assert rows[name, "began"].status == "passed"
        assert "did not end within" in rows[name, f"the section {name}"].detail
    assert rows["gpt", "a look"].status == "skipped"
    assert "(--limit)" in rows["gpt", "a look"].detail
    assert bench.written() == [asdict(row) for row in found]


def test_no_time_at_all_is_a_failure(bench: Bench) -> None:
    (found,) = bench.run([section("row('a')")], limit=0)
    assert (found.status, "--limit" in found.detail) == ("failed", True)


def test_sections_of_a_stage_run_side_by_side_and_stages_do_not(bench: Bench) -> None:
    """Each of two waits for the other's file; the next stage finds both gone."""
    program = """
(folder / "here").touch()
other = folder.parent / "{}" / "here"
while not other.exists():
    time.sleep(0.02)
row("met")
time.sleep(0.3)
(folder / "ended").touch()
"""
    behind = """
gone = [(folder.parent / name / "ended").exists() for name in ("kernels", "memory")]
row("alone", "passed" if all(gone) else "failed")
"""
    found = bench.run(
        [section(program.format("memory")), section(program.format("kernels"), name="memory")],
        [section(behind, name="speed")],
    )
    assert [(r.check, r.status) for r in found] == [
        ("met", "passed"), ("met", "passed"), ("alone", "passed"),
    ]  # fmt: skip


def test_parts_of_a_section_share_its_name(bench: Bench) -> None:
    """Each is a process with a folder of its own."""
    program = f"""
import json, sys
for at in (0, 1):
    with open("{bench.work}/kernels-%d/rows.jsonl" % at, "a") as file:
        line = {{"section": "kernels", "check": "x", "status": "passed"}}
        print(json.dumps(line), file=file)
"""
    one = Section("kernels", "a look", parts=2, command=(sys.executable, "-c", program))
    for part in (0, 1):
        (bench.work / f"kernels-{part}").mkdir()
    found = bench.run([one])
    assert {r.section for r in found} == {"kernels"}
    assert [line.split(":")[0] for line in bench.said[1:]] in (
        ["kernels-0", "kernels-1"],
        ["kernels-1", "kernels-0"],
    )


def test_a_crash_does_not_end_the_sections_behind_it(bench: Bench) -> None:
    found = bench.run([section("os.abort()")], [section("row('a')", name="memory")])
    assert [r.status for r in found] == ["failed", "passed"]
    assert bench.said[1].startswith("kernels: 1 failed in")


def test_a_rehearsal_says_what_needs_a_gpu(bench: Bench) -> None:
    (found,) = bench.run([section("row('a')", needs_gpu=True)])
    assert (found.status, found.detail) == ("skipped", "not run: it needs a GPU")
    bench.device = "cuda"
    assert [r.check for r in bench.run([section("row('a')", needs_gpu=True)])][-1] == "a"


# ---- what is written -----------------------------------------------------------------------------


def test_failures_and_missed_bars_come_last_and_whole(bench: Bench) -> None:
    long = "why " * 60
    program = f"""
row("broken", "failed", detail="{long.strip()}")
row("slow", bar="0.7 <= 0.66 missed", detail="much")
row("fine")
"""
    bench.run([section(program)], [section("row('good', bar='0.9 >= 0.9 met')", name="speed")])
    lines = (bench.output / "acceptance.txt").read_text().splitlines()
    assert lines[-2] == "MISSED: kernels: slow: 0.7 <= 0.66 missed much"
    assert lines[-1] == f"FAILED: kernels: broken:  {long.strip()}"
    assert "commit abc; 3 passed, 1 failed, 0 skipped; bars: 1 met, 1 missed" in lines
    assert sum("good" in line for line in lines) == 1


def test_at_most_eight_files_come_out_whatever_sections_leave(bench: Bench) -> None:
    program = """
for name in ("bench_step.json", "bench_step.txt", "bench_step.png", "gpt.json", "a.txt", "b.json"):
    (folder / name).write_text(name)
for number in range(30):
    (folder / ("more%d.txt" % number)).write_text("x")
(folder / "iter_0000004").mkdir()
(folder / "iter_0000004" / "state.distcp").write_bytes(b"x" * 4096)
(folder / "large.txt").write_bytes(b"x" * (3 << 20))
row("a")
"""
    bench.run([section(program)], [section(program, name="speed")])
    assert bench.files == {*OWN, *FILES}
    assert len(bench.files) + 1 <= MOST == 8  # one more while a file is written
    assert (bench.output / "gpt.json").read_text() == "gpt.json"
    with tarfile.open(bench.output / "logs.tgz") as tar:
        names = set(tar.getnames())
    assert {"kernels/log.txt", "speed/more29.txt", "kernels/rows.jsonl"} <= names
    assert not {name for name in names if "distcp" in name or "large" in name}


KILLED = """
import sys, time
from pathlib import Path
from tests.scripts.test_gpu_acceptance import Bench, section
bench = Bench(Path(sys.argv[1]))
hang = "row('measured', detail='much'); (folder / 'gpt.json').write_text('1'); time.sleep(100)"
bench.run([section("row('first')")], [section(hang, 100, "gpt")])
"""


def test_a_kill_in_the_middle_leaves_what_was_found(tmp_path: Path) -> None:
    """Also of the section that was running, which ends as well."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    path, rows = tmp_path / "output/acceptance.json", []
    end = time.monotonic() + 100
    while len(rows) < 2 and time.monotonic() < end:
        time.sleep(0.1)
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
    process.kill()
    process.wait()
    assert [(row["section"], row["check"]) for row in rows] == [
        ("kernels", "first"),
        ("gpt", "measured"),
    ]
    assert "much" in (tmp_path / "output/acceptance.txt").read_text()
    with tarfile.open(tmp_path / "output/logs.tgz") as tar:  # of the section before
        assert "kernels/rows.jsonl" in tar.getnames()


def test_a_command_that_is_told_to_end_says_what_was_running(bench: Bench) -> None:
    stop = "row('a'); os.kill(os.getppid(), signal.SIGUSR1); time.sleep(100)"

    def stopped(number, frame):
        raise Stopped("SIGUSR1")

    before = signal.signal(signal.SIGUSR1, stopped)
    try:
        with pytest.raises(Stopped):
            bench.run([section(stop, 100)], [section("row('b')", name="speed")])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [(r["check"], r["status"]) for r in bench.written()] == [
        ("a", "passed"),
        ("the section kernels", "failed"),
    ]
    assert "SIGUSR1" in bench.written()[1]["detail"]


# ---- rows ----------------------------------------------------------------------------------------


def test_bars_are_shown_and_fail_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        writer = Writer("speed", file)
        writer.measured("share", 0.93, least=0.9, detail="4 of 4.3 TB/s")
        writer.measured("ratio", 0.7, most=0.66)
        writer.measured("nothing", float("nan"), most=0.66)
    met, missed, broken = read(path)
    assert (met.status, met.bar, met.missed) == ("passed", "0.930 >= 0.90 met", False)
    assert (missed.status, missed.bar, missed.missed) == ("passed", "0.700 <= 0.66 missed", True)
    assert broken.status == "failed"
    assert summary([met, missed]) == "2 passed, 0 failed, 0 skipped; bars: 1 met, 1 missed"
    assert (status([met, missed]), status([met, broken])) == (0, 1)


def test_nothing_passed_is_no_success() -> None:
    assert status([Row("a", "b", "skipped")]) == 1


def test_the_table() -> None:
    rows = [
        Row("one", "a", "passed", "x" * 90),
        Row("one", "long name", "failed", "why"),
        Row("two", "b", "passed", "", "0.9 >= 0.90 met"),
    ]
    assert table(rows).splitlines() == [
        "section  check      result  bar              detail",
        "one      a          PASSED                   " + "x" * 75 + "...",
        "         long name  FAILED                   why",
        "two      b          PASSED  0.9 >= 0.90 met",
    ]


# ---- what sections judge by ----------------------------------------------------------------------


@pytest.mark.parametrize("case", [kernels.Case(), kernels.Case(BF16, BF16, BF16, BF16)], ids=str)
def test_a_right_step_is_found_right(case: kernels.Case) -> None:
    assert compare(case, lambda o: None) is None


WRONG = {
    "param": (lambda o: o.param[3:4].add_(1e-3), "param is not bitwise"),
    "one bit": (lambda o: o.state[0].view(torch.int32)[5:6].bitwise_xor_(1), "exp_avg is not"),
    "model": (lambda o: o.model_param[-1:].zero_(), "model_param is not bitwise"),
    "gradient": (lambda o: o.grad[:1].add_(1), "a gradient was written"),
    "behind": (lambda o: torch.as_strided(o.param, (201,), (1,))[200:].zero_(), "behind a tensor"),
    "before": (
        lambda o: torch.as_strided(o.param, (1,), (1,), o.param.storage_offset() - 1).zero_(),
        "before or",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_step_is_found_wrong(wrong: str) -> None:
    change, said = WRONG[wrong]
    assert said in compare(kernels.Case(), change)


def compare(case: kernels.Case, change) -> str | None:
    placed = kernels.Placed(200, case, "cpu", offset=1)
    stepped = kernels.stepped(placed.start, "cpu", **kernels.OPTIONS)
    o = placed.operands
    for mine, right in zip((o.param, *o.state), (stepped.param, *stepped.state), strict=True):
        mine.copy_(right)
    o.model_param.copy_(stepped.param)
    change(o)
    return kernels.compare(placed, interpreted=False, device="cpu", **kernels.OPTIONS)


def test_the_portable_step_itself_is_held_against_the_reference(monkeypatch) -> None:
    def wrong(*args, **options):
        return s3_update(*args, **options).mul_(1.0001)

    placed = kernels.Placed(200, kernels.Case(), "cpu")
    monkeypatch.setattr(kernels, "s3_update", wrong)
    options = kernels.OPTIONS
    portable.step(wrong, [placed.operands], **options)
    found = kernels.compare(placed, interpreted=False, device="cpu", **options)
    assert "float64 reference" in found


def test_checkpoints_differ_by_a_bit(tmp_path: Path) -> None:
    state = {"weight": torch.ones(5), "exp_pnorm": torch.ones(3, dtype=BF16)}
    for name, bits in (("one", 0), ("same", 0), ("other", 1)):
        state["exp_pnorm"].view(torch.int16)[1:2].bitwise_xor_(bits)
        dcp.save(state, checkpoint_id=tmp_path / name / "iter_0000008", no_dist=True)
    assert training.different(tmp_path / "one", tmp_path / "same") is None
    found = training.different(tmp_path / "one", tmp_path / "other")
    assert found == "1 of 2 tensors differ, the first is exp_pnorm"


@pytest.mark.parametrize("case", [kernels.Case(), kernels.Case(BF16, BF16, BF16, BF16)], ids=str)
def test_statistics_are_held_against_the_portable_step(case: kernels.Case) -> None:
    """Found wrong: one count, one sum, a step that differs where statistics are counted."""

    def found(wrong) -> str | None:
        def step(rule, operands, *, statistics=None, **options):
            portable.step(rule, operands, statistics=statistics, **options)
            if statistics is not None:
                wrong(operands, statistics.values)

        placed = [kernels.Placed(n, case, "cpu", offset=1) for n in (200, 3)]
        return kernels.counted(SimpleNamespace(step=step), placed, **kernels.OPTIONS)

    assert found(lambda given, values: None) is None
    assert "zero_grads is" in found(lambda given, values: values[0, 6].add_(1))
    assert "sum_sq_update is" in found(lambda given, values: values[0, 2].mul_(1.0001))
    assert "max_abs_update is" in found(lambda given, values: values[0, 1].mul_(1.0000001))
    assert "other bits" in found(lambda given, values: given[1].param[2:].add_(1))


def test_a_bounded_step_is_held_against_the_reference() -> None:
    options = kernels.OPTIONS | kernels.VARIANTS["bounded"]
    for bound, wanted in ((1.3, None), (1.2, "exp_avg is not bitwise")):
        placed = kernels.Placed(200, kernels.Case(), "cpu")
        portable.step(s3_update, [placed.operands], **options | {"grad_bound": bound})
        said = kernels.compare(placed, interpreted=False, device="cpu", **options)
        assert said is None if wanted is None else said is not None


def test_a_phase_is_judged_by_the_fastest_adamw_that_clips_in_fp32(tmp_path: Path) -> None:
    def candidate(key: str, kind: str, ms: float, share: float = 0.5) -> dict:
        spread = {"median": ms}
        times = dict.fromkeys(("ms", "host_ms", "device_ms"), spread)
        more = {"rounds_ms": [ms, ms], "share_of_copy": share, "gb_s": 4000.0}
        return {"key": key, "kind": kind, **times, **more}

    comparison = {
        "shape": "flat",
        "copy": {"gb_s": 4300.0},
        "candidates": [
            candidate("adamw-fused", "adamw", 12.0),
            candidate("adamw-fused/norm", "phase", 1.0),
            candidate("adamw-fused-unclipped", "adamw", 9.0),
            candidate("adamw-fused-bf16", "adamw", 5.0),
            candidate("adamw-te", "adamw", 10.0),
            candidate("s3-triton-p3-fp32-grads-fp32-states", "kernel", 7.0, 0.95),
            candidate("s3-triton-p3-fp32-grads-bf16-states", "kernel", 5.0),
            candidate("s3-triton-p3-bf16-grads-bf16-states-statistics", "kernel", 4.0, 0.85),
            candidate("s3-portable-p3-fp32-grads-fp32-states", "portable", 90.0),
        ],
    }
    with (tmp_path / "rows.jsonl").open("w") as file:
        speed.judge(Writer("speed", file), comparison, judged=True)
    found = {r.check.removeprefix("phase, flat, "): r for r in read(tmp_path / "rows.jsonl")}
    assert [r.bar for r in found.values()] == [
        "0.700 <= 0.66 missed",
        "0.950 >= 0.90 met",
        "",
        "0.500 >= 0.90 missed",
        "0.400 <= 0.45 met",
        "0.850 >= 0.90 missed",
    ]
    detail = found["fp32-grads-fp32-states"].detail
    assert "0.58 of adamw-fused, 0.78 of adamw-fused-unclipped, 1.40 of adamw-fused-bf16" in detail
    assert "wall 7.000, host 7.000, device 7.000" in detail


LOG = """
 [2026-11-29 17:00:00.000000] iteration       10/  200000 | consumed samples:          320 |
 elapsed time per iteration (ms): 900.0 | learning rate: 3.0E-04 | lm loss: 1.0817E+01 |
 [2026-11-29 17:00:00.000000] iteration       20/  200000 | consumed samples:          640 |
 elapsed time per iteration (ms): 110.5 | learning rate: 6.0E-04 | lm loss: 9.5E+00 |
validation loss at iteration 20 on validation set | lm loss value: 9.4E+00 | lm loss PPL: 1.2E+04
""".replace("|\n elapsed", "| elapsed")


def test_what_a_training_has_printed(tmp_path: Path) -> None:
    found = gpt.read(LOG)
    assert found == {
        "losses": [(10, 10.817), (20, 9.5)],
        "valid": [(20, 9.4)],
        "ms": 110.5,
        "portable": False,
    }
    assert gpt.read("")["losses"] == []


# ---- the command ---------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "_no_gpu", lambda: "torch sees no NVIDIA GPU here")
    assert command.main(["--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no GPU: torch sees no NVIDIA GPU here. It would have run environment (")
    assert all(s.name in line for s in command.sections("cuda"))
    assert not (tmp_path / "out").exists()


def test_table_files_and_status(monkeypatch, capsys, tmp_path: Path) -> None:
    """The whole command, with sections of which one crashes."""
    work = tmp_path / "work"
    work.mkdir()
    stages = [
        Stage([placed(section("row('a', bar='0.9 >= 0.90 met')"), work)], 1),
        Stage([placed(section("sys.exit(4)", name="speed"), work)], 1),
    ]
    monkeypatch.setattr(command, "STAGES", {"cpu": stages, "cuda": command.STAGES["cuda"]})
    monkeypatch.setattr(command.tempfile, "mkdtemp", lambda prefix: str(work))
    monkeypatch.setattr(command.shutil, "rmtree", lambda *a, **k: None)
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.sh", "--cpu"])
    output = tmp_path / "output"
    assert command.main(["--cpu", "--output", str(output)]) == 1
    printed = capsys.readouterr().out
    assert "1 passed, 1 failed, 0 skipped; bars: 1 met, 0 missed" in printed
    record = json.loads((output / "acceptance.json").read_text())
    assert record["status"] == 1 and record["device"] == "cpu" and record["date"]
    assert record["commit"] and record["limit"] == 600
    assert [row["status"] for row in record["rows"]] == ["passed", "failed"]
    assert (output / "acceptance.txt").read_text().strip() in printed
    assert command.main(["--cpu", "--output", str(output), "--skip", "speed"]) == 0


def test_the_limit_counts_from_the_start_of_the_script(monkeypatch, capsys, tmp_path) -> None:
    stages = [Stage([section("row('a')")], 1)]
    monkeypatch.setattr(command, "STAGES", {"cpu": stages, "cuda": command.STAGES["cuda"]})
    monkeypatch.setenv(command.STARTED, str(time.time() - 50))
    words = ["--cpu", "--limit", "50", "--output", str(tmp_path)]
    assert command.main(words) == 1
    assert "0 s were left" in capsys.readouterr().out


def test_what_is_carried_lies_where_sections_look(tmp_path: Path) -> None:
    work, carried = tmp_path / "work", tmp_path / "carried"
    work.mkdir()
    carried.mkdir()
    (carried / "shards.json").write_text("{}")
    for name in ("web_train.bin", "web_train.idx", "web_valid.bin", "web.json"):
        (carried / name).write_text(name)
    command._given(work, carried / "shards.json", carried / "web")
    task = Task("cpu", work / "speed")
    assert task.shards.read_text() == "{}"
    assert task.data.with_name("std_train.bin").read_text() == "web_train.bin"
    assert task.data.with_name("std_valid.bin").exists()


def test_every_section_has_its_module() -> None:
    from scripts.acceptance import section as child

    for device in command.STAGES:
        assert sorted(s.name for s in command.sections(device)) == sorted(child.SECTIONS)
    # What is timed has the machine for itself.
    alone = [[s.name for s in stage.sections] for stage in command.STAGES["cuda"][1:]]
    assert alone == [["speed"], ["gpt"]]


def test_a_writer_puts_a_detail_on_one_line() -> None:
    file = io.StringIO()
    Writer("one", file).failed("a", "two\nlines")
    assert json.loads(file.getvalue())["detail"] == "two lines"


def script(*words: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SCRIPT, *words],
        env=os.environ | {"MEGATRON_S3_PYTHON": sys.executable, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )


def test_the_script_explains_itself_and_refuses_a_folder_without_wheels(tmp_path: Path) -> None:
    asked = script("--help")
    assert asked.returncode == 0 and "Usage: ./scripts/gpu_acceptance.sh" in asked.stdout
    refused = script("--wheels", tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: --wheels {tmp_path}: no folder with wheels")


def test_the_script_refuses_a_folder_that_was_not_filled(tmp_path: Path) -> None:
    refused = script("--carried", tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: --carried {tmp_path}: not a folder that --carry has")


def test_the_commit_is_read_where_there_is_no_git(tmp_path: Path) -> None:
    """By the whole script, from what was carried."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "COMMIT").write_text("0123abc changed\n")
    copy = tmp_path / "copy"
    for part in ("scripts", "tests", "megatron_s3", "configs"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("results"))
    words = ["--cpu", "--only", "memory", "--output", str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"MEGATRON_S3_PYTHON": sys.executable, "PYTHONWARNINGS": "ignore"}
    for carried, wanted in ((True, "0123abc"), (False, "unknown")):
        environment |= {"MEGATRON_S3_COMMIT": str(tmp_path / "COMMIT")} if carried else {}
        run = subprocess.run(
            [copy / "scripts/gpu_acceptance.sh", *words],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        record = json.loads((tmp_path / "out/acceptance.json").read_text())
        assert (record["commit"], record["changed"]) == (wanted, True if carried else None)
        environment.pop("MEGATRON_S3_COMMIT", None)


@pytest.mark.thorough
@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(tmp_path: Path) -> None:
    """All but the trainings."""
    words = ("--cpu", "--skip", "training", "gpt", "--output", tmp_path)
    run = script(*words)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = json.loads((tmp_path / "acceptance.json").read_text())["rows"]
    passed = {row["section"] for row in rows if row["status"] == "passed"}
    assert passed == {"environment", "prepare", "kernels", "memory", "speed"}
    not_run = {row["section"] for row in rows if row["detail"] == "not run: it needs a GPU"}
    assert not_run - passed == {"graphs", "sanitizer", "suite"}
    assert {path.name for path in tmp_path.iterdir()} <= {*OWN, *FILES}
    assert (tmp_path / "bench_step.png").exists()


@pytest.mark.slow
@pytest.mark.thorough
def test_a_rehearsal_of_the_trainer(tmp_path: Path) -> None:
    run = script("--cpu", "--only", "training", "gpt", "--output", tmp_path, "--limit", "400")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = json.loads((tmp_path / "acceptance.json").read_text())["rows"]
    more = "1 rank, statistics, bounded gradients, int8 states"
    trained = {r["check"]: r["status"] for r in rows if r["section"] == "training"}
    assert trained == {
        "2 and more ranks": "skipped",
        "1 rank train": "passed",
        "1 rank: the kernel steps": "passed",
        "1 rank: resume": "passed",
        f"{more} train": "passed",
        f"{more}: the kernel steps": "passed",
        f"{more}: resume": "passed",
    }
    found = [r["check"] for r in rows if r["section"] == "gpt"]
    assert {"S3 trains", "AdamW trains", "losses on the same samples"} <= set(found)
    assert set(json.loads((tmp_path / "gpt.json").read_text())) == {"S3", "AdamW"}
