"""The acceptance command: tables, limits, crashes, and a rehearsal. Nothing here has a GPU."""

import io
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_s3.kernels import portable
from megatron_s3.rules.s3 import s3_update
from scripts.acceptance import __main__ as command
from scripts.acceptance import kernels, runner, speed, training
from scripts.acceptance.rows import Row, Writer, read, table
from scripts.acceptance.runner import Section

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu_acceptance.sh"
F32, BF16 = torch.float32, torch.bfloat16


def section(program: str, limit: float = 20) -> Section:
    """One that runs a program, given a ``row`` to write rows with."""
    start = """
import json, os, signal, sys, time
file = open(sys.argv[1], "w")
def row(check, status="passed", **more):
    line = {"section": "one", "check": check, "status": status, **more}
    print(json.dumps(line), file=file, flush=True)
"""
    return Section("one", "a look", limit, (sys.executable, "-c", start + program))


def rows_of(program: str, output: Path, *, limit: float = 20, left: float = 60) -> list[Row]:
    one = section(program, limit)
    path = output / "one/rows.jsonl"
    return runner.run(
        Section(one.name, one.what, one.limit, (*one.command, str(path))), "cpu", output, left
    )


# ---- one section ---------------------------------------------------------------------------------


def test_rows_of_a_section_that_ends_well(tmp_path: Path) -> None:
    found = rows_of("row('a'); row('b', 'skipped', detail='why'); print('said')", tmp_path)
    assert [(r.check, r.status, r.detail) for r in found] == [
        ("a", "passed", ""),
        ("b", "skipped", "why"),
    ]
    assert (tmp_path / "one/log.txt").read_text() == "said\n"
    assert runner.status(found) == 0


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("print('CUDA error'); sys.exit(3)", "ended with exit status 3: CUDA error"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended with SIGSEGV: it printed nothing"),
        ("raise RuntimeError('illegal memory access')", "illegal memory access"),
    ],
)
def test_a_crash_fails_the_section_and_keeps_its_rows(end: str, said: str, tmp_path: Path) -> None:
    found = rows_of(f"row('before'); {end}", tmp_path)
    assert [(r.check, r.status) for r in found] == [
        ("before", "passed"),
        ("the section itself", "failed"),
    ]
    assert said in found[1].detail
    assert runner.status(found) == 1


def test_the_time_limit_ends_a_section_with_all_that_it_started(monkeypatch, tmp_path) -> None:
    """The process that it has started, too, which is told by a pipe's end."""
    pipe, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    program = f"""
row('before')
import subprocess
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], pass_fds=[{theirs}])
print('waiting', flush=True)
time.sleep(60)
"""
    one = section(program, limit=1)
    process = (*one.command, str(tmp_path / "one/rows.jsonl"))
    popen = subprocess.Popen
    with monkeypatch.context() as patch:
        # What a section starts inherits nothing by itself.
        patch.setattr(subprocess, "Popen", lambda *a, **k: popen(*a, pass_fds=[theirs], **k))
        begin = time.monotonic()
        found = runner.run(Section("one", "a look", 1, process), "cpu", tmp_path, 60)
    os.close(theirs)
    assert time.monotonic() - begin < 30
    assert select.select([pipe], [], [], 10)[0], "what it started runs on"
    assert os.read(pipe, 1) == b""  # nobody holds the other end
    os.close(pipe)
    assert [(r.check, r.status) for r in found] == [
        ("before", "passed"),
        ("the section itself", "failed"),
    ]
    assert found[1].detail == "did not end within 1 s; its last line: waiting"


def test_no_rows_are_a_failure_and_torn_ones_are_left_out(tmp_path: Path) -> None:
    (silent,) = rows_of("pass", tmp_path)
    assert (silent.status, silent.detail) == ("failed", "reported nothing")
    (whole,) = rows_of("row('a'); file.write('{\"section\": \"on')", tmp_path)
    assert whole.check == "a"


def test_what_the_limit_of_the_whole_leaves_no_time_for_has_failed(tmp_path: Path) -> None:
    (found,) = rows_of("row('a')", tmp_path, left=0)
    assert found.status == "failed"
    assert "--limit" in found.detail


def test_a_crash_does_not_end_the_sections_behind_it(tmp_path: Path) -> None:
    said: list[str] = []
    sections = []
    for name, program in (("first", "os.abort()"), ("second", "row('a')")):
        one = section(program)
        path = str(tmp_path / name / "rows.jsonl")
        sections.append(Section(name, one.what, one.limit, (*one.command, path)))
    found = runner.run_all(sections, "cpu", tmp_path, 60, said.append)
    assert [r.status for r in found] == ["failed", "passed"]
    assert said[1].startswith("first: 1 failed in")


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
    assert runner.summary([met, missed]) == "2 passed, 0 failed, 0 skipped; bars: 1 met, 1 missed"
    assert (runner.status([met, missed]), runner.status([met, broken])) == (0, 1)


def test_nothing_passed_is_no_success() -> None:
    assert runner.status([Row("a", "b", "skipped")]) == 1


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


def test_a_phase_is_judged_by_the_fastest_adamw(tmp_path: Path) -> None:
    def candidate(key: str, kind: str, ms: float) -> dict:
        spread = {"median": ms}
        return {"key": key, "kind": kind, "ms": spread, "host_ms": spread, "rounds_ms": [ms, ms]}

    comparison = {
        "shape": "flat",
        "candidates": [
            candidate("adamw-fused", "adamw", 12.0),
            candidate("adamw-fused/norm", "phase", 1.0),
            candidate("adamw-te", "adamw", 10.0),
            candidate("s3-triton-p3-fp32-grads-fp32-states", "kernel", 7.0),
            candidate("s3-triton-p3-fp32-grads-bf16-states", "kernel", 5.0),
            candidate("s3-triton-p3-bf16-grads-bf16-states", "kernel", 4.0),
            candidate("s3-portable-p3-fp32-grads-fp32-states", "portable", 90.0),
        ],
    }
    with (tmp_path / "rows.jsonl").open("w") as file:
        speed.phases(Writer("speed", file), comparison, judged=True)
    found = read(tmp_path / "rows.jsonl")
    assert [r.bar for r in found] == ["0.700 <= 0.66 missed", "", "0.400 <= 0.45 met"]
    assert "0.58 of adamw-fused, 0.70 of adamw-te" in found[0].detail


def test_the_picture_of_shares(tmp_path: Path) -> None:
    figure = speed.shares_figure({"flat": {"a": 0.95, "b": 0.8}}, "a GPU")
    figure.savefig(tmp_path / "kernel.png")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [0.95, 0.8]


# ---- the command ---------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "_no_gpu", lambda: "torch sees no NVIDIA GPU here")
    assert command.main(["--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no GPU: torch sees no NVIDIA GPU here. It would have run environment (")
    assert all(s.name in line for s in command.SECTIONS)
    assert not (tmp_path / "out").exists()


def test_table_files_and_status(monkeypatch, capsys, tmp_path: Path) -> None:
    sections = []
    for name, program in (("kernels", "row('a', bar='0.9 >= 0.90 met')"), ("speed", "sys.exit(4)")):
        one = section(program)
        path = str(tmp_path / name / "rows.jsonl")
        sections.append(Section(name, one.what, one.limit, (*one.command, path)))
    monkeypatch.setattr(command, "SECTIONS", sections)
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.sh", "--cpu"])
    assert command.main(["--cpu", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "1 passed, 1 failed, 0 skipped; bars: 1 met, 0 missed" in printed
    record = json.loads((tmp_path / "acceptance.json").read_text())
    assert record["status"] == 1 and record["device"] == "cpu" and record["date"]
    assert [row["status"] for row in record["rows"]] == ["passed", "failed"]
    assert (tmp_path / "acceptance.txt").read_text().strip() in printed
    assert command.main(["--cpu", "--output", str(tmp_path), "--skip", "speed"]) == 0


def test_every_section_has_its_module() -> None:
    from scripts.acceptance import section as child

    assert sorted(s.name for s in command.SECTIONS) == sorted(child.SECTIONS)
    # On one GPU they are to fit together; each alone may take its own limit.
    assert all(s.limit <= 300 for s in command.SECTIONS)


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


@pytest.mark.thorough
@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(tmp_path: Path) -> None:
    """All but the trainer."""
    run = script("--cpu", "--skip", "training", "--output", tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = json.loads((tmp_path / "acceptance.json").read_text())["rows"]
    passed = {row["section"] for row in rows if row["status"] == "passed"}
    assert passed == {"environment", "kernels", "memory", "speed"}
    assert {row["section"] for row in rows} - passed == {"graphs", "sanitizer", "suite"}
    assert (tmp_path / "speed/bench_step.png").exists()


@pytest.mark.slow
@pytest.mark.thorough
def test_a_rehearsal_of_the_trainer(tmp_path: Path) -> None:
    run = script("--cpu", "--only", "training", "--output", tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = json.loads((tmp_path / "acceptance.json").read_text())["rows"]
    assert {r["check"]: r["status"] for r in rows} == {
        "2 and more ranks": "skipped",
        "1 rank train": "passed",
        "1 rank: the kernel steps": "passed",
        "1 rank: resume": "passed",
    }
