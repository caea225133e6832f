#!/usr/bin/env python3
"""Measures the step of S3 and of AdamW, on the shards of one rank of a real job.

    python -m scripts.bench.step [--device cpu|cuda] [--shapes 345m-dp8 7b-dp64 flat] [...]

AdamW's step consists of Megatron's phases: gradient norm, clipping, optimizer, and the copy to the
bf16 model parameters.  Megatron clips only while the norm exceeds the limit, so AdamW is measured
with clipping and without it.  S3's step is one pass, which also writes the bf16 model parameters;
it is measured with the statistics that a training run logs, and without them.  AdamW is also
measured with 16-bit gradients and states, beside which S3's figures with these belong.  Each
round measures every candidate once, in random order, so that other load on the machine and the
contents of the caches affect all candidates alike.  Ratios are computed within a round.

Gradients and model parameters are views of one buffer each, at Megatron's distances (gaps are
shortened by multiples of 4096 elements).  Main parameters and states are separate tensors, as in
Megatron.  All candidates use the same memory.

On a GPU there are three times.  The wall time begins on an empty stream and ends when the work is
done.  The host time ends when the call returns; with many small shards it is most of the wall time.
The device time is measured between two events on a stream that was kept busy until the host had
launched everything; a candidate for which the host waits in between has no such time of its own.
The L2 cache is not flushed: shards are larger than it, and all candidates have the same of it.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from megatron_s3.optimizers import OPTIMIZERS
from scripts.bench import timing as bench
from scripts.bench.candidates import BASELINES, candidates
from scripts.bench.commit import commit
from scripts.bench.machine import CLOCKS, clocks, launches, machine, timed
from scripts.bench.memory import SHAPES, Memory, Unavailable, cut, most_elements, shards_of
from scripts.bench.shards import Shard

__all__ = ["main"]


def _say(text: str) -> None:
    """Prints progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def _compare(
    shape: str,
    shards: Sequence[Shard],
    options: argparse.Namespace,
    threads: int | None,
) -> bench.Comparison:
    """Measures all candidates on one list of shards."""
    device = options.device
    kept = cut(shards, options.elements_limit)
    memory = Memory(kept, device)
    chosen = [
        c
        for c in candidates(memory, device, options.p, options.optimizers)
        if c.key in BASELINES or not options.only or any(word in c.key for word in options.only)
    ]
    name = shape if threads is None else f"{shape}, threads {threads}"
    usable = []
    for candidate in chosen:
        _say(f"{name}: warm-up of {candidate.key}")
        try:
            for _ in range(1 if device == "cpu" else 3):
                candidate.step()
        except RuntimeError as error:
            if candidate.kind not in ("kernel", "other"):
                raise
            _say(f"{name}: {candidate.key} is left out: {error}")
            continue
        usable.append(candidate)
    # Each round measures these calls: a candidate's step, then its phases one by one.
    calls: dict[str, list[tuple[str, Callable[[], object]]]] = {
        c.key: [(c.key, c.step)]
        + [(f"{c.key}/{phase}", call) for phase, _, call in c.phases if len(c.phases) > 1]
        for c in usable
    }
    for c in usable:
        if c.in_cache is not None:
            calls[c.key].append((f"{c.key}/in cache", c.in_cache))
    calls["copy"] = [("copy", lambda: memory.copied[1].copy_(memory.copied[0]))]
    memory.copied[1].copy_(memory.copied[0])
    order, drawn = list(calls), random.Random(1)
    times: dict[str, list[tuple[float, float, float]]] = {}
    before = clocks(device)
    for turn in range(options.rounds):
        _say(f"{name}: round {turn + 1} of {options.rounds}")
        drawn.shuffle(order)
        for key in order:
            for part, call in calls[key]:
                times.setdefault(part, []).append(timed(call, device))
    memory.check()

    def timing(key: str, label: str, kind: str, count: float, call: Callable, path: str = ""):
        wall, host, alone = zip(*times[key], strict=True)
        number = launches(call, device)
        return bench.Timing(key, label, kind, count, wall, host, alone, number, path)

    timings = []
    for c in usable:
        timings.append(timing(c.key, c.label, c.kind, c.bytes_per_parameter, c.step, c.path()))
        if len(c.phases) > 1:
            timings += [
                timing(f"{c.key}/{phase}", phase, "phase", count, call)
                for phase, count, call in c.phases
            ]
        if c.in_cache is not None:
            count = c.bytes_per_parameter
            timings.append(
                timing(f"{c.key}/in cache", "from the cache", "phase", count, c.in_cache)
            )
    total = sum(shard.numel for shard in shards)
    return bench.Comparison(
        shape=shape,
        elements=memory.elements,
        shards=len(kept),
        cut_from=total if total > memory.elements else None,
        device=device,
        threads=threads,
        baselines=[key for key in BASELINES if any(c.key == key for c in usable)],
        copy_bytes=2 * memory.copied[0].nbytes,
        copy_ms=[ms for _, _, ms in times["copy"]],
        timings=timings,
        clocks=[before, clocks(device)],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints tables, and writes ``bench_step.json``, ``.txt`` and ``.png``.

    The files are written anew after each shape, so that a run that is ended leaves what it has.

    Returns:
        The exit status: 0, or 2 if a shape or device is not available.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shapes", nargs="+", choices=(*SHAPES, "flat"), default=[*SHAPES, "flat"])
    parser.add_argument(
        "--elements-limit",
        type=_positive,
        metavar="N",
        help="largest number of elements; longer lists are truncated (default: what fits in half "
        "of the free memory)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        nargs="+",
        help="numbers of threads on the CPU (default: torch's)",
    )
    parser.add_argument(
        "--rounds", type=_positive, help="number of rounds (default: 7 on the CPU, 50 on a GPU)"
    )
    parser.add_argument(
        "--p", type=float, nargs="+", default=[3.0], help="values of S3's p (default: 3)"
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=[name for name in OPTIMIZERS if name != "s3"],
        default=[],
        help="other optimizers of the plugin to measure too, with their kernels",
    )
    parser.add_argument(
        "--rank", type=int, default=0, help="rank whose shards are used (default: 0)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        help="measure only candidates whose key contains a WORD",
    )
    parser.add_argument(
        "--shards",
        type=Path,
        metavar="FILE",
        help="keeps the shards, so that Megatron is asked for each shape and rank once",
    )
    parser.add_argument("--output", type=Path, default=Path("bench_step"), metavar="DIR")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda: torch sees no GPU here")
    options.rounds = options.rounds or (50 if options.device == "cuda" else 7)
    options.elements_limit = options.elements_limit or most_elements(options.device)
    try:
        import matplotlib  # noqa: F401 (checked before minutes of measuring)
    except ImportError:
        return _refuse("the picture needs matplotlib: pip install matplotlib")
    threads: list[int | None] = [None]
    if options.device == "cpu":
        threads = options.threads or [torch.get_num_threads()]
    before = torch.get_num_threads()
    comparisons = []
    try:
        for shape in options.shapes:
            _say(f"{shape}: the shards of rank {options.rank}")
            shards = shards_of(shape, options.rank, options.device, options.shards)
            for number in threads:
                if number is not None:
                    torch.set_num_threads(number)
                comparisons.append(_compare(shape, shards, options, number))
                _write(comparisons, options)
    except (Unavailable, ArithmeticError) as error:
        return _refuse(str(error))
    finally:
        torch.set_num_threads(before)
    print((options.output / "bench_step.txt").read_text(encoding="utf-8"), end="")
    return 0


def _write(comparisons: Sequence[bench.Comparison], options: argparse.Namespace) -> None:
    here = machine(options.device)
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **commit(),
        "machine": here,
        "options": {k: v for k, v in vars(options).items() if k not in ("output", "shards")},
        "bytes": "read and written, counted by hand, each tensor once in each phase that needs it",
        "ratios": "wall times, to each baseline's whole step in the same round",
        "times": "wall: from an empty stream until done; host: until the call returns; device: "
        "between events on a busy stream; one and the same on a CPU",
        "cache": "not flushed between candidates",
        "clocks": CLOCKS,
        "comparisons": [c.as_json() for c in comparisons],
    }
    text = "\n\n".join([*(bench.table(c) for c in comparisons), bench.phases(comparisons)])
    options.output.mkdir(parents=True, exist_ok=True)
    part = options.output / "bench_step.part"
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(options.output / "bench_step.json")
    (options.output / "bench_step.txt").write_text(text + "\n", encoding="utf-8")
    title = f"Optimizer step on {here['gpu'] or here['cpu']}, torch {here['torch']}"
    bench.write_png(comparisons, title, options.output / "bench_step.png")
    _say(f"written: {options.output}/bench_step.json, .txt, .png")


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _positive(word: str) -> int:
    number = int(float(word))  # 1e6 is allowed
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, not {word}")
    return number


if __name__ == "__main__":
    sys.exit(main())
