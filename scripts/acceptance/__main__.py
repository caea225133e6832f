"""The acceptance command; ``scripts/gpu_acceptance.sh`` prepares a Python and runs this."""

import argparse
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from scripts.acceptance.report import Report, status, summary
from scripts.acceptance.runner import Section, Stage, Stopped, run_all
from scripts.bench.commit import commit

__all__ = ["STAGES", "STARTED", "main", "sections"]

#: Names the seconds since 1970 at which the limit begins to count, for a script that runs this.
STARTED = "MEGATRON_S3_ACCEPTANCE_STARTED"
#: Processes that share the kernel's combinations, on the GPU machine and in a rehearsal.
_PARTS = {"cuda": 6, "cpu": 1}


def _stages(device: str) -> tuple[Stage, ...]:
    """Returns what runs: sections that time nothing side by side, the others alone."""
    checks = (
        Section("environment", "driver, packages, GPUs", 90),
        Section("prepare", "the shards and a dataset, for what is timed", 150),
        Section("training", "Megatron's trainer with --optimizer s3, and bitwise resume", 240),
        Section(
            "kernels",
            "the kernel against the float64 reference and the portable step",
            200,
            parts=_PARTS[device],
        ),
        Section("graphs", "CUDA graphs of the step against eager steps", 200, needs_gpu=True),
        Section("sanitizer", "the kernel under compute-sanitizer", 200, needs_gpu=True),
        Section("suite", "the tests of the kernel", 200, needs_gpu=True),
        Section("memory", "bytes a parameter that the allocator gives out", 90),
    )
    speed = Section("speed", "the step against AdamW's, and the kernel against a copy", 300)
    gpt = Section("gpt", "a 64M GPT with S3 and with AdamW, in the time that is left", least=30)
    # On a CPU nothing that is timed is of interest.
    weights = (5, 4, 3) if device == "cuda" else (10, 3, 4)
    return tuple(map(Stage, (checks, [speed], [gpt]), weights))


#: By device, in the order in which they run.
STAGES = {device: _stages(device) for device in ("cuda", "cpu")}


def sections(device: str) -> list[Section]:
    """Returns all sections of a device, in order."""
    return [section for stage in STAGES[device] for section in stage.sections]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections; prints the table; keeps JSON, text, pictures and logs in a folder.

    Returns:
        0 if nothing failed, 1 if something did, 2 without a GPU.
    """
    started = time.monotonic() - max(0.0, time.time() - float(os.environ.get(STARTED, "inf")))
    parser = argparse.ArgumentParser(
        prog="gpu_acceptance.sh", description="Whether this machine's GPUs and S3 on them are fit."
    )
    names = [section.name for section in sections("cuda")]
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", default=names)
    parser.add_argument("--skip", nargs="+", choices=names, metavar="SECTION", default=[])
    parser.add_argument("--limit", type=float, default=600, help="seconds for all (default: 600)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: acceptance/DATE-HOST")
    parser.add_argument("--shards", type=Path, metavar="FILE", help="shards that are known")
    parser.add_argument("--data", type=Path, metavar="PREFIX", help="a dataset, see scripts/README")
    parser.add_argument("--cpu", action="store_true", help="rehearse what can run on a CPU")
    args = parser.parse_args(argv)
    device = "cpu" if args.cpu else "cuda"
    chosen = [name for name in names if name in args.only and name not in args.skip]
    stages = [
        Stage([s for s in stage.sections if s.name in chosen], stage.weight)
        for stage in STAGES[device]
        if any(s.name in chosen for s in stage.sections)
    ]
    if not args.cpu and (why := _no_gpu()):
        listed = "; ".join(f"{s.name} ({s.what})" for stage in stages for s in stage.sections)
        print(f"no GPU: {why}. It would have run {listed}. --cpu rehearses on this machine's CPU.")
        return 2
    date = datetime.now(timezone.utc)
    output = args.output or Path("acceptance") / f"{date:%Y-%m-%d-%H%M%S}-{platform.node()}"
    output.mkdir(parents=True, exist_ok=True)
    about = {
        **commit(),
        "date": date.isoformat(timespec="seconds"),
        "host": platform.node(),
        "device": device,
        "command": shlex.join(sys.argv),
        "limit": args.limit,
    }
    if args.cpu:
        note = "a rehearsal on the CPU: nothing here says anything about a GPU"
    else:
        note = "a bar is what the project wants of its speed; one that is missed fails nothing"
    work = Path(tempfile.mkdtemp(prefix="acceptance-"))
    try:
        _given(work, args.shards, args.data)
        report = Report(output, work, about, names, note)
        rows = _run(stages, device, work, report, started + args.limit)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n" + report.text)
    print(f"{time.monotonic() - started:.0f} s; written: {os.path.relpath(output)}/")
    print(summary(rows))
    return status(rows)


def _run(stages: Sequence[Stage], device: str, work: Path, report: Report, deadline: float) -> list:
    """Runs everything; a signal that asks the command to end ends the sections and is reported."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    # On few cores more processes would only be in one another's way.
    at_once = max(4, len(os.sched_getaffinity(0)))
    try:
        begin = time.monotonic()

        def say(line: str) -> None:
            print(f"[{time.monotonic() - begin:4.0f} s] {line}", flush=True)

        return run_all(stages, device, work, report, deadline, say, at_once)
    except Stopped:
        return report.rows
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _given(work: Path, shards: Path | None, data: Path | None) -> None:
    """Puts what was carried where the sections look for it."""
    if shards is not None and shards.exists():
        shutil.copy(shards, work / "shards.json")
    if data is not None:
        (work / "data").mkdir()
        for path in data.parent.glob(f"{data.name}_*"):
            name = "std" + path.name.removeprefix(data.name)
            (work / "data" / name).symlink_to(path.absolute())


def _no_gpu() -> str | None:
    """Why there is no GPU to use, asked in a process that may hang or crash."""
    code = "import torch; print(torch.cuda.is_available() and torch.version.hip is None)"
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return "torch did not answer within 120 s whether there is one"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"torch does not start: {lines[-1]}"
    return None if done.stdout.strip() == "True" else "torch sees no NVIDIA GPU here"


if __name__ == "__main__":
    sys.exit(main())
